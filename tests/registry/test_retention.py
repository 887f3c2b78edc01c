"""Retention policies as tables, and that applying them again and again never drops what they chose."""

from __future__ import annotations

import pickle
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import FrozenInstanceError, dataclass, replace
from itertools import combinations, product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.records import CheckpointInfo
from asyncckpt.registry.retention import KeepBest, KeepEvery, KeepLast, RetentionPolicy, retained

NAN, INF = float("nan"), float("inf")


def info(
    sequence: int, step: int | None = 0, *, epoch: int | None = 0, loss: float | None = None, timestamp: str = ""
) -> CheckpointInfo:
    return CheckpointInfo(
        Path(f"{sequence}.pt"),
        epoch=epoch,
        global_step=step,
        val_loss=loss,
        timestamp=timestamp,
        sequence=sequence,
    )


def at_steps(*steps: int | None) -> list[CheckpointInfo]:
    """Commits 1, 2, 3 and so on at these steps."""
    return [info(sequence, step) for sequence, step in enumerate(steps, start=1)]


def steps_of(checkpoints: Iterable[CheckpointInfo], kept: frozenset[int]) -> list[int | None]:
    return [info.global_step for info in checkpoints if info.sequence in kept]


# --- KeepLast, KeepBest ---


@pytest.mark.parametrize(
    ("num", "steps", "kept"),
    [
        (1, [], set()),
        (1, [10, 20, 30], {3}),
        (2, [10, 20, 30], {2, 3}),
        (3, [10, 20, 30], {1, 2, 3}),
        (9, [10, 20, 30], {1, 2, 3}),
        (2, [10000, 20000, 100], {2, 3}),
        (2, [10000, 20000, 8000, 8100], {3, 4}),
        (1, [None, 10, None], {3}),
    ],
)
def test_the_last_are_the_newest_commits(num: int, steps: list[int | None], kept: set[int]) -> None:
    """By sequence number and in whatever order they come, so that after a rollback the new branch is kept."""
    checkpoints = at_steps(*steps)
    assert KeepLast(num).kept(checkpoints) == kept
    assert KeepLast(num).kept(checkpoints[::-1]) == kept


@pytest.mark.parametrize(
    ("num", "mode", "losses", "kept"),
    [
        (1, "min", [], set()),
        (1, "min", [3.0, 1.0, 2.0], {2}),
        (2, "min", [3.0, 1.0, 2.0], {2, 3}),
        (1, "max", [3.0, 1.0, 2.0], {1}),
        (2, "max", [3.0, 1.0, 2.0], {1, 3}),
        (9, "min", [3.0, 1.0], {1, 2}),
        (1, "min", [2.0, 1.0, 1.0], {2}),
        (1, "max", [1.0, 2.0, 2.0], {2}),
        (2, "max", [2.0, 2.0, 2.0], {1, 2}),
        (2, "min", [NAN, 1.0, None], {2}),
        (2, "max", [NAN, 1.0, None], {2}),
        (1, "min", [NAN, None], set()),
        (1, "min", [1.0, -INF], {2}),
        (1, "max", [1.0, INF, INF], {2}),
        (2, "min", [INF, NAN, 1.0], {1, 3}),
        (1, "min", [0.0, -0.0], {1}),
    ],
)
def test_the_best_by_a_metric(num: int, mode: str, losses: list[float | None], kept: set[int]) -> None:
    """NaN and nothing are never among the best, infinities are values, and of equals the earlier is better."""
    checkpoints = [info(sequence, loss=loss) for sequence, loss in enumerate(losses, start=1)]
    assert KeepBest(num, mode=mode).kept(checkpoints) == kept
    assert KeepBest(num, mode=mode).kept(checkpoints[::-1]) == kept


def test_the_best_by_a_named_metric() -> None:
    """The metric is looked up by its name; checkpoints without it are not kept."""
    checkpoints = [
        replace(info(sequence, loss=0.0), val_metrics=metrics)
        for sequence, metrics in enumerate([{"accuracy": 0.5}, {"accuracy": 0.9}, {"other": 1.0}], start=1)
    ]
    assert KeepBest(3, "accuracy", "max").kept(checkpoints) == {1, 2}
    assert KeepBest(1, "accuracy", "max").kept(checkpoints) == {2}


# --- KeepEvery ---


@pytest.mark.parametrize(
    ("every", "steps", "kept"),
    [
        (1000, [], []),
        (1000, range(300, 3301, 300), [1200, 2100, 3000]),
        (1000, range(0, 3001, 1000), [1000, 2000, 3000]),
        (1000, [0, 999, 1000, 1001], [1000]),
        (1000, [3500, 3600, 4000], [3500, 4000]),
        (1, [1, 2, 4], [1, 2, 4]),
        (1000, [None, 1000, None, 1500, None, 2000], [1000, 2000]),
    ],
)
def test_every_so_many_steps(every: int, steps: Sequence[int | None], kept: list[int]) -> None:
    """The first at or after each multiple; not zero; one may stand for several multiples."""
    checkpoints = at_steps(*steps)
    assert steps_of(checkpoints, KeepEvery(steps=every).kept(checkpoints)) == kept
    assert steps_of(checkpoints, KeepEvery(steps=every).kept(checkpoints[::-1])) == kept


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        pytest.param([900, 1200, 1500, 1300, 1600, 2000], {2, 6}, id="a common milestone is not taken twice"),
        pytest.param([900, 1200, 1500, 1100, 1400, 2000], {2, 4, 6}, id="both branches' milestones"),
        pytest.param([1000, 2000, 3000, 2000, 3000, 4000], {1, 2, 3, 4, 5, 6}, id="the same steps once more"),
        pytest.param([1000, 2000, 1500, 2000], {1, 2, 4}, id="the later milestone shows the rollback"),
        pytest.param([1200, 2100, 1500, 2400], {1, 2, 3, 4}, id="only the branch's first shows the rollback"),
        pytest.param([1200, 2100, 1500, 1800], {1, 2, 3}, id="it may be needed yet"),
        pytest.param([1200, 2100, 1800, 1500, 2000], {1, 2, 5}, id="two rollbacks, shown by the milestone"),
        pytest.param([1200, 2100, 1800, 1500, 2400], {1, 2, 3, 5}, id="two rollbacks, the second abandons nothing"),
        pytest.param([1200, 2100, 1800, 900, 2400], {1, 2, 4, 5}, id="two rollbacks, the second shows both"),
        pytest.param([1200, 2100, 3000, 900, 3300], {1, 2, 3, 4, 5}, id="one for several multiples, once more"),
        pytest.param([1200, 1500, 1400, 1300, 1900], {1}, id="rollbacks that abandon no milestone"),
        pytest.param([1200, 0, 1200, 0, 1200], {1, 3, 5}, id="again and again"),
    ],
)
def test_steps_after_a_rollback(steps: list[int], kept: set[int]) -> None:
    """The new branch gets its own milestones, and the abandoned ones stay."""
    assert KeepEvery(steps=1000).kept(at_steps(*steps)) == kept


@pytest.mark.parametrize(
    ("positions", "kept"),
    [
        pytest.param([(1, 10), (2, 20), (3, 30), (4, 40)], {2, 4}, id="one save each"),
        pytest.param([(1, 10), (2, 15), (2, 18), (2, 20), (3, 30)], {2}, id="several saves of one epoch"),
        pytest.param([(2, 15), (2, 20), (2, 15), (2, 20)], {1, 3}, id="a rollback within an epoch"),
        pytest.param([(2, 20), (3, 30), (2, 20), (4, 40)], {1, 3, 4}, id="a rollback"),
        pytest.param([(1, 0), (2, 0), (3, 0), (4, 0)], {2, 4}, id="steps that are not counted"),
        pytest.param([(2, None), (None, 30), (4, None)], {1, 3}, id="what is not known"),
    ],
)
def test_every_so_many_epochs(positions: list[tuple[int | None, int | None]], kept: set[int]) -> None:
    """Multiples are counted in epochs; within an epoch the step tells a rollback."""
    checkpoints = [info(sequence, step, epoch=epoch) for sequence, (epoch, step) in enumerate(positions, start=1)]
    assert KeepEvery(epochs=2).kept(checkpoints) == kept


@pytest.mark.parametrize(
    ("hours", "timestamps", "kept"),
    [
        (1, [], set()),
        (1, ["2024-05-01T10:59:59", "2024-05-01T11:00:00", "2024-05-01T11:59:59", "2024-05-01T12:00:00"], {1, 2, 4}),
        (6, ["2024-05-01T00:00:00", "2024-05-01T05:59:59", "2024-05-01T06:00:00"], {1, 3}),
        (0.5, ["2024-05-01T10:00:00", "2024-05-01T10:29:59.999999", "2024-05-01T10:30:00"], {1, 3}),
        (1, ["2024-05-01T12:30:00+02:00", "2024-05-01T10:30:00", "2024-05-01T10:30:00Z"], {1}),
        (1, ["2024-05-01T12:30:00+02:00", "2024-05-01T12:30:00+00:00"], {1, 2}),
        (1, ["", "yesterday", "2024-13-01T00:00:00", "2024-05-01T10:30:00", "Z"], {4}),
        (1, ["2024-05-01T11:30:00", "2024-05-01T11:10:00", "2024-05-01T10:50:00"], {1, 3}),
        (1, ["1969-12-31T23:59:59", "1970-01-01T00:00:00", "0001-01-01T00:00:00+14:00"], {1, 2, 3}),
    ],
)
def test_every_so_many_hours(hours: float, timestamps: list[str], kept: set[int]) -> None:
    """The first commit in each window, counted from 1970, whatever the offset; a clock set back displaces nothing."""
    checkpoints = [info(sequence, timestamp=moment) for sequence, moment in enumerate(timestamps, start=1)]
    assert KeepEvery(hours=hours).kept(checkpoints) == kept
    assert KeepEvery(hours=hours).kept(checkpoints[::-1]) == kept


@pytest.fixture
def far_from_utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The machine's clock is set to a zone five and a half hours off."""
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Somewhere-5:30")
        time.tzset()
        yield
    time.tzset()


@pytest.mark.usefixtures("far_from_utc")
def test_hours_are_the_same_in_every_zone() -> None:
    """A timestamp without an offset is UTC, wherever it is read."""
    checkpoints = [info(1, timestamp="2024-05-01T10:10:00+00:00"), info(2, timestamp="2024-05-01T10:50:00")]
    assert KeepEvery(hours=1).kept(checkpoints) == {1}


# --- all of them ---


def test_either_keeps() -> None:
    """`|` keeps what any of the policies keeps."""
    checkpoints = [info(sequence, step=sequence, loss=-sequence % 5) for sequence in range(1, 9)]
    assert (KeepLast(2) | KeepBest(1) | KeepEvery(steps=3)).kept(checkpoints) == {7, 8, 5, 3, 6}
    assert (KeepLast(2) | KeepBest(1)).kept([]) == frozenset()


def test_composition_is_flat() -> None:
    """However it is bracketed it is the same policy, which prints as it was written and survives pickling."""
    last, best, every = KeepLast(3), KeepBest(2, "accuracy", "max"), KeepEvery(hours=1.5)
    policy = (last | best) | every
    assert policy == last | (best | every)
    assert hash(policy) == hash(last | (best | every))
    assert policy != last | best
    assert repr(policy) == "KeepLast(num=3) | KeepBest(num=2, metric='accuracy', mode='max') | KeepEvery(hours=1.5)"
    assert eval(repr(policy)) == policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    with pytest.raises(TypeError):
        last | 3  # type: ignore[operator]


def test_policies_do_not_change() -> None:
    """They are values."""
    with pytest.raises(FrozenInstanceError):
        KeepLast(3).num = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("policy", "arguments", "error", "words"),
    [
        (KeepLast, {"num": 0}, ValueError, "num must be at least 1, not 0"),
        (KeepLast, {"num": -1}, ValueError, "num"),
        (KeepLast, {"num": True}, TypeError, "num must be an int, not True"),
        (KeepLast, {"num": 2.0}, TypeError, "num"),
        (KeepLast, {"num": "3"}, TypeError, "num"),
        (KeepBest, {"num": 0}, ValueError, "num"),
        (KeepBest, {"num": True}, TypeError, "num"),
        (KeepBest, {"num": 1, "mode": "MIN"}, ValueError, "mode must be"),
        (KeepEvery, {}, ValueError, "exactly one of steps, epochs and hours"),
        (KeepEvery, {"steps": 1, "hours": 1}, ValueError, "exactly one"),
        (KeepEvery, {"steps": 0}, ValueError, "steps must be at least 1"),
        (KeepEvery, {"steps": True}, TypeError, "steps"),
        (KeepEvery, {"epochs": 0}, ValueError, "epochs must be at least 1"),
        (KeepEvery, {"epochs": 1.5}, TypeError, "epochs"),
        (KeepEvery, {"hours": 0}, ValueError, "hours"),
        (KeepEvery, {"hours": -1.0}, ValueError, "hours"),
        (KeepEvery, {"hours": NAN}, ValueError, "hours"),
        (KeepEvery, {"hours": INF}, ValueError, "hours"),
        (KeepEvery, {"hours": 1e300}, ValueError, "hours"),
        (KeepEvery, {"hours": 1e-300}, ValueError, "hours"),
        (KeepEvery, {"hours": 10**400}, ValueError, "hours"),
        (KeepEvery, {"hours": True}, TypeError, "hours must be a number"),
        (KeepEvery, {"hours": "1"}, TypeError, "hours"),
    ],
)
def test_arguments_are_checked(
    policy: type[RetentionPolicy], arguments: dict[str, object], error: type[Exception], words: str
) -> None:
    """A policy that makes no sense can't be made, and the error says which argument is wrong."""
    with pytest.raises(error, match=words):
        policy(**arguments)


@dataclass(frozen=True)
class KeepNothing(RetentionPolicy):
    def kept(self, checkpoints: Sequence[CheckpointInfo]) -> frozenset[int]:
        return frozenset()


@pytest.mark.parametrize(
    ("best", "protected", "kept"), [(None, [], {4}), (2, [], {2, 4}), (None, [1, 3], {1, 3, 4}), (4, [1], {1, 4})]
)
def test_what_a_directory_always_keeps(best: int | None, protected: list[int], kept: set[int]) -> None:
    """The newest commit, the best one and protected ones, whatever the policy."""
    checkpoints = [
        replace(checkpoint, is_best=checkpoint.sequence == best, protected=checkpoint.sequence in protected)
        for checkpoint in at_steps(10, 30, 20, 5)
    ]
    assert retained(KeepNothing(), checkpoints) == kept
    assert retained(KeepNothing(), checkpoints[::-1]) == kept


def test_pinned_ones_are_always_kept() -> None:
    """Damaged or not; and they hold no older damaged one back."""
    first, second, third, fourth = at_steps(10, 20, 30, 40)
    pinned = [replace(first, pinned=True), second, replace(third, damaged=True), fourth]
    assert retained(KeepNothing(), pinned) == {1, 4}
    assert retained(KeepNothing(), [first, second, replace(third, damaged=True, pinned=True), fourth]) == {3, 4}
    assert retained(KeepLast(1), pinned) == {1, 4}


def test_what_a_directory_keeps_besides() -> None:
    """The policy's choice is added; of nothing, nothing is kept."""
    assert retained(KeepEvery(steps=1000), at_steps(500, 1000, 1500)) == {2, 3}
    assert retained(KeepLast(1), []) == frozenset()


# --- applied again and again ---

COUNTS = st.one_of(st.none(), st.integers(0, 12))
HISTORIES = st.lists(
    st.builds(
        info,
        st.just(0),
        COUNTS,
        epoch=COUNTS,
        loss=st.sampled_from([None, NAN, INF, -INF, 0.0, 1.0, 2.0, 3.0]),
        timestamp=st.sampled_from(["", *(f"2024-05-01T{hour:02}:30" for hour in range(6))]),
    ),
    max_size=14,
).map(lambda commits: [replace(commit, sequence=sequence) for sequence, commit in enumerate(commits, start=1)])
MILESTONES = st.one_of(
    st.integers(1, 5).map(lambda num: KeepEvery(steps=num)), st.integers(1, 5).map(lambda num: KeepEvery(epochs=num))
)
OTHERS = st.one_of(
    st.integers(1, 4).map(KeepLast),
    st.builds(KeepBest, st.integers(1, 4), mode=st.sampled_from(["min", "max"])),
    st.integers(1, 3).map(lambda num: KeepEvery(hours=num)),
)


def _count(policy: KeepEvery, commit: CheckpointInfo) -> int:
    return (commit.global_step if policy.steps else commit.epoch) or 0


def milestones(policy: KeepEvery, history: list[CheckpointInfo]) -> frozenset[int]:
    """The definition, word for word: the first on its branch to reach some multiple."""
    every = policy.steps or policy.epochs or 0
    counted = [
        (commit.sequence, (count, commit.global_step or 0))
        for commit in history
        if (count := commit.global_step if policy.steps else commit.epoch) is not None
    ]

    def is_on_one_branch(start: int, end: int) -> bool:
        return all(position > counted[start][1] for _, position in counted[start + 1 : end + 1])

    def is_first(index: int, multiple: int) -> bool:
        return counted[index][1][0] >= multiple and not any(
            counted[earlier][1][0] >= multiple and is_on_one_branch(earlier, index) for earlier in range(index)
        )

    return frozenset(
        sequence
        for index, (sequence, _) in enumerate(counted)
        if sequence is not None and any(is_first(index, multiple) for multiple in range(every, 13, every))
    )


def retain_step_by_step(policy: RetentionPolicy, history: list[CheckpointInfo]) -> Iterator[list[CheckpointInfo]]:
    """What is left after each commit, when the policy is applied after every one."""
    left: list[CheckpointInfo] = []
    for commit in history:
        left = [*left, commit]
        kept = retained(policy, left)
        left = [commit for commit in left if commit.sequence in kept]
        yield left


@given(MILESTONES, HISTORIES)
def test_milestones_are_as_defined(policy: KeepEvery, history: list[CheckpointInfo]) -> None:
    """Every milestone is kept, and what shows rollbacks: at most one checkpoint for each abandoned milestone."""
    kept, defined = policy.kept(history), milestones(policy, history)
    assert kept >= defined
    abandoned = {
        milestone.sequence
        for milestone, later in combinations(history, 2)
        if milestone.sequence in defined and _count(policy, later) <= _count(policy, milestone)
    }
    assert len(kept - defined) <= len(abandoned)


@given(MILESTONES | OTHERS, HISTORIES, st.data())
def test_what_was_not_kept_does_not_matter(
    policy: RetentionPolicy, history: list[CheckpointInfo], data: st.DataObject
) -> None:
    """Without any of those that it dropped a policy chooses as before."""
    kept = policy.kept(history)
    left = [commit for commit in history if commit.sequence in kept or data.draw(st.booleans())]
    assert policy.kept(left) == kept


@given(MILESTONES, OTHERS | st.just(KeepNothing()), HISTORIES)
def test_milestones_are_kept_for_ever(policy: KeepEvery, other: RetentionPolicy, history: list[CheckpointInfo]) -> None:
    """Applied after every commit, together with another policy, none is ever dropped."""
    for left, end in zip(retain_step_by_step(policy | other, history), range(1, len(history) + 1), strict=True):
        assert {commit.sequence for commit in left} >= milestones(policy, history[:end])


@given(st.lists(MILESTONES | OTHERS, min_size=1, max_size=3), HISTORIES)
def test_step_by_step_or_at_once(policies: list[RetentionPolicy], history: list[CheckpointInfo]) -> None:
    """Applied after every commit, a policy keeps what it would keep of the whole history."""
    policy = policies[0]
    for other in policies[1:]:
        policy = policy | other
    for left, end in zip(retain_step_by_step(policy, history), range(1, len(history) + 1), strict=True):
        assert {commit.sequence for commit in left} == policy.kept(history[:end]) | {end}


def test_all_short_histories() -> None:
    """The same for every history of five commits at four steps."""
    policy = KeepEvery(steps=2)
    for steps in product(range(1, 5), repeat=5):
        history = at_steps(*steps)
        *_, left = retain_step_by_step(policy, history)
        assert {commit.sequence for commit in left} == policy.kept(history) | {5}
        assert policy.kept(history) >= milestones(policy, history)
