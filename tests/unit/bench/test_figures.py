"""The benchmark's arithmetic: which rounds count, and what is said of them."""

from pathlib import Path

import pytest
from bench import summary, table, targets
from bench.generator import Load, Result, Sample
from bench.interleave import DISTURBED_SHARE, Round, Slot, good
from bench.placement import Placement, classify
from bench.pollers import PollerRound
from bench.report import Cell, Machine, Report
from bench.streams import Streams, Turn


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
    result = Result(10, 11, 64, 10, 0, 170, 150, 20, 0, 0, 0, 0, 0, 0, 0, samples, None)
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


def test_a_missed_target_names_the_worst_of_its_figures_and_what_bounds_it() -> None:
    most = targets.Target("cycles", 0.8, lambda _: {}, bound="gravity")
    assert targets.verdict(most, {"a": 0.5, "b": 0.8}) == ("0.50 to 0.80", "met")
    measured, said = targets.verdict(most, {"a": 0.9, "b": 1.0, "c": 0.7})
    assert measured == "0.70 to 1.00"
    assert said == "**missed in 2 of 3 by 25%**, most by b (1.00); bounded by gravity"
    least = targets.Target("rate", 2.0, lambda _: {}, at_least=True)
    assert targets.verdict(least, {"": 2.5}) == ("2.50", "met")
    assert targets.verdict(least, {"": 1.5}) == ("1.50", "**missed by 25%** (1.50)")


def test_targets_are_computed_from_the_rounds_of_a_report() -> None:
    cell = Cell("modes", "packed", Load(), [pair(90, 100)] * 3)
    report = Report("full", "", 0, Machine("", 2, "", {}), {"viaduct": "Viaduct", "testpmd": "testpmd"}, [cell])
    report.streams.append(
        Streams(
            "tap",
            {"bridge": "bridge", "viaduct-adaptive": "Viaduct"},
            [{"bridge": Turn(1e8, None, 1, 0), "viaduct-adaptive": Turn(2e8, 0.5, 1, 0)}],
        )
    )
    report.pollers.append(PollerRound([10, 20], [12, 15]))
    found = {what: (measured, said) for what, _, measured, said in targets.rows(report)}
    measured, said = found["cycles per packet against testpmd io, 64 B"]
    assert measured == "0.90"
    assert said.startswith("**missed by 12%**")
    assert found["TCP from a tap to a guest, rate against each"] == ("2.00", "met")
    assert found["a second poller on port pairs of its own"] == ("1.80", "met")
    assert "CPU with no traffic" not in found, "nothing is said of what was not measured"
