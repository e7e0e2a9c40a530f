"""Assignments as text: what they set, and what is said about those that cannot be carried out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

import hyperlearn as hl
from hyperlearn.experiments.data_cleaning import METHODS, DataCleaning
from hyperlearn.settings import SettingsError, known_settings, override, unknown_name


@dataclass(frozen=True)
class Inner:
    """Of a solver.

    Parameters
    ----------
    maxiter
        How often.
    """

    maxiter: int | None = None

    def __post_init__(self) -> None:
        if self.maxiter == 0:
            raise ValueError("maxiter=0; expected at least 1")


@dataclass(frozen=True)
class Outer:
    """Of everything.

    Parameters
    ----------
    count, size
        Whole
        numbers.
    kind : str
        One of two.

    Notes
    -----
    flag
        Not here.
    """

    count: int = 1
    size: float = 1.0
    flag: bool = False
    name: str = "a"
    kind: Literal["fast", "slow"] = "fast"
    limit: float | None = 2.0
    solver: Inner = field(default_factory=Inner)
    function: Any = None

    def __post_init__(self) -> None:
        if self.count > 10 and not self.flag:
            raise ValueError("count > 10 needs flag=True")


@dataclass(frozen=True)
class Twin:
    """Has a `count` too."""

    count: int = 1


class TestValues:
    @pytest.mark.parametrize(
        ("assignment", "key", "value"),
        [
            ("count=3", "count", 3),
            ("count=-3", "count", -3),
            ("count=1e1", "count", 10),
            ("count = 3 ", "count", 3),
            ("size=3", "size", 3.0),
            ("size=1e4", "size", 1e4),
            ("size=-.5", "size", -0.5),
            ("flag=true", "flag", True),
            ("flag=False", "flag", False),
            ("name=b=c", "name", "b=c"),
            ("kind=slow", "kind", "slow"),
            ("limit=None", "limit", None),
            ("limit=none", "limit", None),
            ("limit=3", "limit", 3.0),
        ],
    )
    def test_by_the_annotated_type(self, assignment, key, value):
        (changed,) = override([Outer()], [assignment])
        assert getattr(changed, key) == value
        assert type(getattr(changed, key)) is type(value)

    def test_whole_numbers_are_exact(self):
        (changed,) = override([Outer(flag=True)], [f"count={2**60 + 1}"])
        assert changed.count == 2**60 + 1

    def test_nested(self):
        (changed,) = override([Outer()], ["solver.maxiter=20", "size=2"])
        assert changed == Outer(size=2.0, solver=Inner(20))

    def test_all_at_once(self):
        (changed,) = override([Outer()], ["count=11", "flag=true"])
        assert changed.count == 11

    def test_each_object_gets_its_own(self):
        task, method = override(
            [DataCleaning(), METHODS["cg10"]], ["train_size=500", "damping=0.5", "solver.maxiter=3"]
        )
        assert task == DataCleaning(train_size=500)
        assert method.damping == 0.5
        assert method.solver.maxiter == 3
        assert method.solver.stop_at_maxiter

    def test_what_is_not_addressed_is_returned_as_it_is(self):
        outer = Outer()
        assert override([outer], [])[0] is outer

    @pytest.mark.parametrize("label", METHODS)
    def test_every_key_of_every_method_takes_its_own_value(self, label):
        for item in (METHODS[label], DataCleaning()):
            settings = known_settings(item)
            assert settings
            assert override([item], [f"{s.key}={s.value}" for s in settings]) == (item,)


class TestErrors:
    @pytest.mark.parametrize(
        ("assignment", "message"),
        [
            ("count", "'count': expected key=value"),
            ("=3", "'=3': expected key=value"),
            ("", "'': expected key=value"),
            ("cuont=3", "unknown setting 'cuont' of Outer: did you mean 'count'"),
            ("cuont=3", "--list-settings shows all of them"),
            ("solver.maxitr=3", "did you mean 'solver.maxiter'"),
            ("xyz=3", "unknown setting 'xyz' of Outer: --list-settings"),
            ("count=1.5", "count=1.5: expected a whole number"),
            ("count=", "count=: expected a whole number"),
            ("count=none", "count=none: expected a whole number"),
            ("count=nan", "count=nan: expected a whole number"),
            ("size=big", "size=big: expected a number"),
            ("size=nan", "size=nan: expected a number"),
            ("size=inf", "size=inf: expected a number"),
            ("flag=1", "flag=1: expected true or false"),
            ("kind=slowly", "kind=slowly: expected fast or slow"),
            ("limit=low", "limit=low: expected a number or none"),
            ("solver=CG", "'solver' is a group of settings of Outer: set solver.maxiter"),
            ("solver.maxiter=x", "solver.maxiter=x: expected a whole number or none"),
            ("solver.maxiter=0", "cannot set solver.maxiter=0: maxiter=0; expected at least 1"),
            ("count=11", "cannot set count=11: count > 10 needs flag=True"),
            ("function=3", "unknown setting 'function'"),
        ],
    )
    def test_message(self, assignment, message):
        with pytest.raises(SettingsError) as error:
            override([Outer()], [assignment])
        assert message in str(error.value)

    def test_validation_of_a_method(self):
        with pytest.raises(SettingsError, match=r"cannot set inner_steps=0: NHGD: inner_steps=0"):
            override([hl.NHGD()], ["inner_steps=0"])

    def test_given_twice(self):
        with pytest.raises(SettingsError, match="'count' is given twice"):
            override([Outer()], ["count=1", "count=2"])

    def test_ambiguous(self):
        with pytest.raises(
            SettingsError, match="'count' is ambiguous: Outer and Twin both have it"
        ):
            override([Outer(), Twin()], ["count=2"])

    def test_no_ambiguity_today(self):
        task = {setting.key for setting in known_settings(DataCleaning())}
        for method in METHODS.values():
            assert not task & {setting.key for setting in known_settings(method)}

    def test_unknown_name(self):
        text = unknown_name("method", "cg1", ["nhgd", "cg10"])
        assert text == "unknown method 'cg1': did you mean 'cg10'? Known: nhgd, cg10"


class TestMeanings:
    def test_from_the_docstring(self):
        settings = {setting.key: setting for setting in known_settings(Outer())}
        assert settings["count"].meaning == settings["size"].meaning == "Whole numbers."
        assert settings["kind"].meaning == "One of two."
        assert settings["solver.maxiter"].meaning == "How often."
        assert settings["solver.maxiter"].owner == "Inner"
        assert settings["flag"].meaning == ""

    @pytest.mark.parametrize("label", METHODS)
    def test_every_setting_is_documented(self, label):
        for item in (METHODS[label], DataCleaning()):
            assert [s.key for s in known_settings(item) if not s.meaning] == []
