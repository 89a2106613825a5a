"""What asks a run to stop, and what ends it at once."""

import signal

import pytest

from lm.train import signals
from lm.train.signals import StopRequest


def deferred() -> StopRequest:
    request = StopRequest()
    request.deferred = True
    return request


def test_a_scheduler_and_a_supervisor_may_both_send_it(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    request = deferred()
    for _ in range(3):
        request.handle(signal.SIGTERM, None)
    assert request.received == "SIGTERM"
    assert not raised, "it was asked once, and saves"
    monkeypatch.setattr(signals, "SAME_SECONDS", 0.0)
    request.handle(signal.SIGTERM, None)
    assert raised == [signal.SIGTERM], "later, somebody is in a hurry"


def test_ctrl_c_twice_is_a_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[int] = []
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(signal, "raise_signal", raised.append)
    request = deferred()
    request.handle(signal.SIGINT, None)
    request.handle(signal.SIGINT, None)
    assert raised == [signal.SIGINT]
