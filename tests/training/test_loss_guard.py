from pathlib import Path

import pytest
import torch

from unembed.errors import TrainingError
from unembed.training.loss import LossGuard

from .helpers import make_config

NOWHERE = Path("nowhere")
BAD = [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))]


def guard(**settings):
    return LossGuard(make_config(**settings).training, torch.device("cpu"))


def judge(this, loss, norm=1.0):
    return this.judge(torch.tensor(loss), torch.tensor(norm)).item()


@pytest.mark.parametrize(("loss", "norm"), BAD)
def test_judge_what_is_not_finite_is_bad_from_the_first_step(loss, norm, tmp_path):
    this = guard()
    assert judge(this, loss, norm) == 1.0
    with pytest.raises(TrainingError, match=r"1 bad steps in all.*No state was saved yet"):
        this.check(1, tmp_path / "latest")
    (tmp_path / "latest").touch()
    with pytest.raises(TrainingError, match=r"The last good state is in .*latest; .* resume"):
        this.check(1, tmp_path / "latest")


def test_judge_a_loss_explodes_against_its_running_average_once_there_is_one():
    this = guard(explosion=5.0)
    assert judge(this, 20.0) == 0.0  # nothing to compare with yet
    assert [judge(this, 2.0) for _ in range(300)] == [0.0] * 300
    assert judge(this, 9.0) == 0.0
    assert judge(this, 11.0) == 1.0
    assert judge(this, 2.0) == 0.0


def test_judge_a_loss_that_is_nearly_nothing_may_jump_about():
    this = guard()
    assert [judge(this, 1e-3) for _ in range(50)] == [0.0] * 50
    assert judge(this, 0.5) == 0.0
    assert judge(this, 1.5) == 1.0


def test_judge_bad_steps_leave_the_average_and_the_norm_alone():
    one, other = guard(on_bad_loss="skip"), guard(on_bad_loss="skip")
    for loss in (3.0, 2.0, 2.5):
        judge(one, loss, loss)
        judge(other, loss, loss)
    for loss, norm in BAD:
        judge(one, loss, norm)
    assert one.state[0] == other.state[0]
    assert one.norm == other.norm == 2.5
    found = one.check(7, NOWHERE)
    assert (found.good, found.skipped, found.in_a_row) == (3, 4, 4)


def test_judge_a_hundred_in_a_row_are_hopeless():
    this = guard(on_bad_loss="skip")
    for _ in range(99):
        judge(this, float("nan"))
    this.check(99, NOWHERE)
    judge(this, float("nan"))
    with pytest.raises(TrainingError, match="100 bad steps"):
        this.check(100, NOWHERE)


def test_a_saved_state_goes_on_and_is_not_reported_again():
    this = guard(on_bad_loss="skip")
    for loss in (1.0, float("nan"), 2.0):
        judge(this, loss)
    again = guard(on_bad_loss="stop")
    again.restore(this.state.clone())
    assert again.check(3, NOWHERE).skipped == 1
    judge(again, float("nan"))
    with pytest.raises(TrainingError):
        again.check(4, NOWHERE)
