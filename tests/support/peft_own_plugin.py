"""A plugin for PEFT's own tests: this package registered or not, and an end to every test."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

LONGEST = 300
"""Seconds for one test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--registered", action="store_true", help="with peft_svdinit imported first")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--registered"):
        tuner = importlib.import_module("peft_svdinit.tuner.model").SvdLoraModel
        mapping = importlib.import_module("peft.mapping").PEFT_TYPE_TO_TUNER_MAPPING
        if mapping["LORA"] is not tuner:
            pytest.exit("peft_svdinit was imported and is not registered", 3)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"{item.nodeid} took longer than {LONGEST} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        return (yield)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
