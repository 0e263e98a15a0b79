"""The tables of the comparison with Open vSwitch: what was seen, and nothing that was not."""

from bench.reliability import Bystanders, Outage, Results, Storm, text
from bench.report import Machine


def test_an_outage_without_end_says_what_helped() -> None:
    results = Results("today", 60, Machine("", 2, "", {"Open vSwitch": "3.1.0"}))
    results.outages = [
        Outage("ovs", "switch listens", "split", None, 0, "starting the guests again"),
        Outage("viaduct-adaptive", "switch listens", "split", 1.056, 0),
        Outage("viaduct-adaptive", "switch listens", "packed", 0.25, 0),
    ]
    page = text(results)
    assert "| OVS-DPDK, switch listens | not within 9 s; by starting the guests again | - |" in page
    assert "| Viaduct, switch listens | 1.06 s | 0.25 s |" in page


def test_storms_and_killed_guests_have_a_row_for_each_switch() -> None:
    results = Results("today", 60, Machine("", 2, "", {}))
    results.bystanders = [Bystanders("ovs", 3, 1000, 7, 0)]
    results.storms = [Storm("viaduct-adaptive", 6.2e6, 0.9987, 12.3, 45.6, 0.51)]
    results.failures = ["a storm in ovs: it ended\nwith many words"]
    page = text(results)
    assert "| OVS-DPDK | 3 | 1,000 | 7 | 0 |" in page
    assert "| Viaduct | 6.2 | 99.9% | 12 | 46 | 51% |" in page
    assert page.endswith("- FAILED: a storm in ovs: it ended\n")
