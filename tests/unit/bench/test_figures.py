"""The benchmark's arithmetic: which rounds count, and what is said of them."""

from pathlib import Path

import pytest
from bench import summary, table
from bench.generator import Load, Result, Sample
from bench.interleave import DISTURBED_SHARE, Round, Slot, good
from bench.placement import Placement, classify


def slot(cycles: float, placement: Placement = "near", waited: float = 0) -> Slot:
    return Slot(
        rate=1e9 / cycles,
        cycles=cycles,
        busy=1,
        round_trip_ns=90,
        placement=placement,
        waited=waited,
        sent=100,
        lost=0,
        checked=10,
        corrupt=0,
        disordered=0,
    )


def pair(ours: float, peers: float, placement: Placement = "near", waited: float = 0) -> Round:
    return {"viaduct": slot(ours, placement, waited), "testpmd": slot(peers, placement)}


def cycles(each: Slot) -> float:
    return each.cycles


@pytest.mark.parametrize(
    ("round_trips", "word"),
    [
        ([90, 95, 88], "near"),
        ([260, 400, 255], "far"),
        ([90, 260, 95, 270], "mixed"),
        ([90] * 19 + [260], "near"),
        ([90, 91], "unknown"),
    ],
)
def test_a_placement_is_what_nearly_all_probes_say(round_trips: list[float], word: str) -> None:
    assert classify(round_trips) == word


def test_a_round_is_good_only_if_all_its_slots_are() -> None:
    assert good(pair(70, 100))
    assert not good(pair(70, 100, waited=2 * DISTURBED_SHARE))
    assert not good({"viaduct": slot(70), "testpmd": slot(100, "far")})


def test_undisturbed_near_rounds_are_preferred_and_far_ones_are_not_mixed_in() -> None:
    best = [pair(70, 100)] * 3
    disturbed = [pair(90, 120, waited=0.5)] * 4
    far = [pair(180, 200, "far")] * 5
    assert summary.choose([*far, *disturbed, *best]) == ("near, undisturbed", best)
    assert summary.choose([*far, *disturbed]) == ("near", disturbed)
    assert summary.choose(far) == ("far", far)
    assert summary.choose(far[:2]) == ("all", far[:2])


def test_ratios_are_taken_within_a_round() -> None:
    # Whatever slows a whole round down leaves its ratio alone.
    rounds = [pair(70 * factor, 100 * factor) for factor in (1, 2, 5)]
    found = summary.ratio(rounds, "viaduct", "testpmd", cycles)
    assert found is not None
    assert found.median == pytest.approx(0.7)
    assert found.n == 3
    assert found.low == pytest.approx(found.high)
    assert summary.ratio(rounds, "viaduct", "ovs", cycles) is None


def test_a_spread_is_the_tenth_to_the_ninetieth_percentile() -> None:
    assert summary.spread(range(101)) == summary.Spread(50, 10, 90, 101)
    assert summary.spread([]) is None


def test_rates_are_those_of_the_intervals() -> None:
    samples = [Sample(10.5, 60, 50, 0), Sample(11.0, 170, 150, 0)]
    result = Result(10, 11, 64, 10, 0, 170, 150, 20, 0, 0, 0, 0, 0, 0, samples, None)
    assert result.rates() == [100, 200]


def test_a_load_is_written_as_the_generator_reads_it() -> None:
    assert "size=512 both=1 rate=0 " in Load(size=512, both=True).words()


def test_a_table_is_put_between_its_markers_and_nowhere_else(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n")
    assert table.insert(page, "new\n")
    assert table.insert(page, "newer\n")
    assert page.read_text() == f"before\n{table.BEGIN}\nnewer\n{table.END}\nafter\n"
    page.write_text("no markers")
    assert not table.insert(page, "new\n")
    assert page.read_text() == "no markers"
