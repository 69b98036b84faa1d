"""Train a model at full rank first, then go on with its layers at low rank.

    accelerate launch recipes/progressive_lowrank.py --output_dir runs/low_rank
    accelerate launch recipes/progressive_lowrank.py --switch epoch --lowrank_switch_epoch 2 ...
    accelerate launch recipes/progressive_lowrank.py --min_size 262144 ...
    accelerate launch recipes/progressive_lowrank.py --attention_ratio 0.2 \\
        --feed_forward_ratio 0.2 --shrink_shares 0.4 0.6 --shrink_ratios 0.15 0.10 ...

These are the progressive scheme, the same by epochs, the selective one and the dynamic one;
`--switch step --switch_step 0` is at low rank from the start. The folder then holds a dense model
that anybody loads, the factors and `low_rank.json` beside it, and the run's record. Under FSDP and
DeepSpeed the switch takes place between two Trainers (`--in_place false`).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from stages.fit import Materials, check_complete, fit, outcome
from stages.low_rank_options import LowRankOptions
from stages.processes import leave_process_group
from stages.progressive import factor_batches, train_in_two
from stages.pushing import prepare_push
from stages.resuming import check_checkpoint
from train_full_teacher import loaded

from peft_svdinit.low_rank import LowRankPlan, check_rule, low_rank_layers
from peft_svdinit.training import (
    DataOptions,
    ModelOptions,
    RecipeArguments,
    parse_options,
    refusals_in_one_line,
    whole_weights,
    write_run_info,
)


def main(argv: list[str] | None = None) -> None:
    classes = (ModelOptions, DataOptions, LowRankOptions, RecipeArguments)
    model, data, low, arguments = parse_options(
        classes, argv, description=__doc__ or "", script=__file__
    )
    with refusals_in_one_line((model, data, low, arguments)):
        check_checkpoint(arguments)
        materials = Materials.prepare(model, data)
        with whole_weights():
            base: Any = loaded(model)
        check_rule(base, low.rule)
        per_epoch = -(-len(materials.train) // (arguments.train_batch_size * arguments.world_size))
        step = low.step_of_switch(arguments, -(-per_epoch // arguments.gradient_accumulation_steps))
        if not 0 <= step < arguments.max_steps:
            raise ValueError(
                f"the switch is after {step} of max_steps={arguments.max_steps} steps, so that "
                "nothing would be trained at low rank; take more steps, or switch earlier"
            )
        push = prepare_push(arguments, model)
        in_place = low.is_in_place(arguments)
        if not in_place and step == 0:
            raise ValueError(
                "in_place=false needs a step at full rank; use switch_step of 1 or more"
            )
        logging.basicConfig(format="%(message)s")
        logging.getLogger("trainer_callbacks").setLevel(logging.INFO)
        if in_place:
            batches = factor_batches(materials, low, arguments)
            callback = low.callback(arguments, batches)
            noted = {"low_rank": {"rule": low.rule.as_dict(), "in_place": True}}
            run = fit(base, materials, arguments, extra=noted, callbacks=[callback])
            trained = base
            if run is not None:
                run.info["extra"]["low_rank"]["switches"] = callback.switches
                write_run_info(run.directory, run.info)
        else:
            del base
            run, trained = train_in_two(materials, model, data, low, arguments, step)
        if run is not None:
            low_rank = (
                LowRankPlan.of(trained).summary() if low_rank_layers(trained) else "still dense"
            )
            print(f"{outcome(run)}; {low_rank}; model and record in {run.directory}")
        check_complete(Path(str(arguments.output_dir)))
        push(str(arguments.output_dir))


if __name__ == "__main__":
    main()
    leave_process_group()
