"""A few paragraphs to run models on where there is no text at hand: prose, arithmetic, code."""

from __future__ import annotations

SAMPLE_TEXTS = (
    "The harbour froze early that year. Fishermen dragged their boats up the beach on wooden "
    "rollers, tarred the seams, and waited for the wind to turn. In the evenings they mended nets "
    "by the stove and argued about whether the herring would come back in spring.",
    "Plants make sugar from carbon dioxide and water, using the energy of sunlight. The green "
    "pigment in their leaves absorbs mostly red and blue light, and the reaction gives off oxygen. "
    "At night, when there is no light, they use some of that sugar themselves.",
    "Question: A baker sells 12 rolls in the morning and three times as many in the afternoon. "
    "Each roll costs 2 euros. How much does she earn that day?\nAnswer: In the afternoon she sells "
    "3 * 12 = 36 rolls, so 12 + 36 = 48 rolls in all. She earns 48 * 2 = 96 euros.",
    "def moving_average(values, width):\n"
    '    """Mean of each run of `width` neighbouring values."""\n'
    "    if width < 1:\n"
    '        raise ValueError("width must be at least 1")\n'
    "    return [\n"
    "        sum(values[start : start + width]) / width\n"
    "        for start in range(len(values) - width + 1)\n"
    "    ]\n",
    "To change the tyre, first loosen the nuts by half a turn while the wheel is still on the "
    "ground. Then lift the car, take the nuts off, and pull the wheel towards you. Tighten the new "
    "one crosswise, lower the car, and tighten every nut again.",
)
