"""The regression guard's judgement: what counts as growth, and what the figures of another compiler are good for."""

from bench.instructions import CASES, judge

KEPT = {"rustc 1.90.0": {"split, 64 B": 900.0}, "rustc 1.95.0": {"split, 64 B": 500.0}}


def faults(value: float, compiler: str) -> list[str]:
    return judge({"split, 64 B": value}, KEPT, compiler)[1]


def test_up_to_five_percent_more_is_allowed() -> None:
    assert not faults(525, "rustc 1.95.0")
    assert not faults(100, "rustc 1.95.0")
    found = faults(526, "rustc 1.95.0")
    assert "526.0 instead of 500.0 instructions, +5.2%" in found[0]
    assert "rustc 1.95.0" in found[-1]


def test_each_compiler_is_compared_with_itself() -> None:
    assert not faults(900, "rustc 1.90.0")
    assert faults(960, "rustc 1.90.0")


def test_an_unknown_compiler_is_compared_with_the_latest_known_by_a_wider_margin() -> None:
    assert not faults(570, "rustc 1.99.0")
    assert "counted with rustc 1.99.0" in faults(580, "rustc 1.99.0")[-1]


def test_a_case_without_figures_is_a_fault() -> None:
    assert judge({"packed, 64 B": 500}, KEPT, "rustc 1.95.0")[1][0] == "packed, 64 B: no figure is kept"
    assert judge({"packed, 64 B": 500}, {}, "rustc 1.95.0")[1]


def test_all_modes_are_counted() -> None:
    words = {frozenset(case) for case in CASES.values()}
    for layout in ("split", "packed"):
        for size in ("64", "1500"):
            assert {frozenset({layout, size}), frozenset({layout, size, "unmergeable"})} <= words
        assert frozenset({layout, "64", "macs=20000"}) in words
