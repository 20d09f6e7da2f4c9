"""Signals that end a run, with the loop that they end."""

import os
import signal

import pytest
from stand_in import Loader, fingerprint, run

from codi_jax.training.checkpoint import list_checkpoints


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_run_after_the_step_with_a_checkpoint(tmp_path, capsys, number, status):
    def send(given: int) -> None:
        if given == 6:
            os.kill(os.getpid(), number)

    whole = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as ended:
        run(tmp_path / "parts", loader=Loader(8, send))
    assert ended.value.code == status
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
    assert list_checkpoints(tmp_path / "parts") == [4, 5]
    message = f"stopped by {signal.Signals(number).name} after step 5 and saved checkpoint-5: resume with"
    assert message in capsys.readouterr().err
    resumed = run(tmp_path / "parts", resume_from_checkpoint="latest")
    assert fingerprint(resumed) == fingerprint(whole)


def test_a_second_sigint_ends_at_once(tmp_path):
    def send(given: int) -> None:
        if given == 6:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    # A process that was started in the background ignores SIGINT.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, loader=Loader(8, send))
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loader_that_goes_down_with_the_signal_does_not_matter(tmp_path):
    """Ctrl-C reaches the loader's processes, too."""

    def send(given: int) -> None:
        if given == 6:
            os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("the worker has gone")

    with pytest.raises(SystemExit):
        run(tmp_path, loader=Loader(8, send))
    assert list_checkpoints(tmp_path) == [4, 5]
