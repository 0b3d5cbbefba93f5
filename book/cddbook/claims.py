"""Verdicts on the paper's claims, computed from the studies' records.

A verdict is mechanical. Each claim is written as an effect that the paper expects to be positive, measured once a
replicate (its own expert or seed). If the 95 % confidence interval of the mean (Student's t over replicates) lies
above zero the claim is *confirmed* in that setting, below zero *contradicted*, and else, or with fewer than three
replicates, it is *not settled*. Segments are M epochs long; pairs that share one count for C1 alone. Intervals
are not corrected for their number: of twenty effects that are zero, one is settled by chance. C1 is about some pairs of
segments: tests of all pairs, corrected for their number, decide it.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import pandas as pd

from cddbook import correlation
from cddbook.findings import (
    CONTROLS,
    Correlations,
    Effect,
    Record,
    at_equal,
    comparison,
    correlations,
    curves,
    effect,
    gpu_runs,
    paired,
    probes_at_equal,
    tests_of,
    transfers,
)
from cddbook.records import read_record
from cddbook.tables import markdown

Verdict = Literal["confirmed", "contradicted", "not settled", "not tested"]

CORRELATION_STUDIES = {
    "digits, IPC 1": "correlation-digits-ipc1",
    "CIFAR-10, IPC 1": "correlation-cifar10-ipc1",
    "CIFAR-10, IPC 10": "correlation-cifar10-ipc10",
    "CIFAR-10, IPC 50": "correlation-cifar10-ipc50",
}
"""Committed records of correlation studies by the name of their setting; `book/record.sh` makes them."""

SEGMENT_STUDIES = {
    "CIFAR-10, IPC 1": "segments-cifar10-ipc1",
    "CIFAR-10, IPC 1, 12,000 segments": "segments-cifar10-ipc1-long",
    "CIFAR-10, IPC 1, published network": "segments-cifar10-ipc1-published",
}
"""Committed records of comparisons of segment counts."""

GPU_PRICES: dict[str, dict[int, int]] = {
    "after equal time": {},
    "after 500 matched segments": {1: 500, 2: 250},
    "after 500 iterations": {1: 500, 2: 500},
}
"""When sets of the GPU's runs are compared: at the end, or after iterations by K."""

FEWEST = 3
"""Replicates below which nothing is settled: the spread of two is mostly luck."""

CLAIMS = {
    "C1": "Matching some segments is negatively correlated with matching others.",
    "C2": "With few images per class the negative pairs lie below the diagonal, with many above it.",
    "C3": "Matching one segment at a time raises the others' losses: it forgets.",
    "C4": "This raises the accumulated trajectory error.",
    "C5": "Concurrent matching makes correlations positive, does not forget, and helps more than EWC and SI.",
    "C6": "Concurrent matching gives better accuracy (reviews: +1.1 to +3.6 points over MTT, +0.3 to +1.6 over DATM).",
    "C7": "It transfers better to other architectures, and is lossless at 20 % of CIFAR.",
    "C8": "It needs no more memory, an iteration takes longer in proportion to K, and it converges faster.",
}
"""The paper's claims, as its abstract and public reviews report them."""


class Finding(NamedTuple):
    """What one measure says about one claim in one setting."""

    claim: str
    setting: str
    measure: str
    effect: str
    verdict: Verdict


def verdict(found: Effect) -> Verdict:
    """Of the claim that the effect is positive."""
    if found.count >= FEWEST and found.low > 0:
        return "confirmed"
    return "contradicted" if found.count >= FEWEST and found.high < 0 else "not settled"


Row = tuple[str, str, Effect, str]
"""A claim, a measure, its effect, and the unit of an effect that is shown times 100."""


def _finding(setting: str, claim: str, measure: str, found: Effect, unit: str = "") -> Finding:
    shown = f"{found.shown(100.0 if unit else 1.0, 2, unit)}, n = {found.count}"
    return Finding(claim=claim, setting=setting, measure=measure, effect=shown, verdict=verdict(found))


def _of_pairs(setting: str, study: Correlations) -> Finding:
    """C1: one pair that correlates negatively beyond chance confirms it; it is contradicted if all do so positively."""
    beyond = [correlation.off_diagonal(study.p_values(sign)) < 0.05 for sign in (-1, 1)]
    negative, positive = (int(pairs.sum()) for pairs in beyond)
    shown = f"{negative} of {beyond[0].size} negatively, {positive} positively"
    said: Verdict = "confirmed" if negative else "contradicted" if beyond[1].all() else "not settled"
    if len(study.pearson()) < FEWEST:
        said = "not settled"
    measure = "pairs whose losses correlate beyond chance while one is matched (one-sided t tests, Holm)"
    return Finding(claim="C1", setting=setting, measure=measure, effect=shown, verdict=said)


def _of_correlation(study: Correlations) -> list[Row]:
    """What a correlation study says about C2, C3 and C5."""
    rows: list[tuple[str, str, Any, str]] = []
    earlier, negatively = study.below, "correlate negatively"
    if study.ipc in (1, 50):
        side, sign = ("below minus above", 1) if study.ipc == 1 else ("above minus below", -1)
        below, above = correlation.negative_shares(study.pearson(), earlier)
        measure = f"share of {earlier.sum()} pairs a side whose losses {negatively}, {side} the diagonal"
        rows.append(("C2", measure, sign * (below - above), ""))
    others = {"sharing no epoch with": earlier | earlier.T, "earlier than": earlier, "later than": earlier.T}
    for which, pairs in others.items():
        measure = f"change of the losses of segments {which} the one that is matched alone"
        rows.append(("C3", measure, study.net_change()[..., pairs].mean(axis=1), " %"))
    price = f"at equal iterations, {len(study.starts)} segments an iteration against one"
    one, several = ((study.pearson(kind)[..., earlier | earlier.T] < 0).mean(axis=1) for kind in CONTROLS)
    shares = f"sequential ({one.mean():.0%}) minus concurrent ({several.mean():.0%})"
    rows.append(("C5", f"share of pairs whose losses {negatively} within a run, {shares}, {price}", one - several, ""))
    return [(claim, measure, effect(values), unit) for claim, measure, values, unit in rows]


def _of_images(same: Sequence[Correlations]) -> list[Row]:
    """C2 over studies of one data set: negative pairs on each side of the diagonal, with fewest and most images."""
    few, many = (extreme(same, key=lambda study: study.ipc) for extreme in (min, max))
    if few.ipc == many.ipc:
        return []
    least, most = (correlation.negative_shares(study.pearson(), study.below) for study in (few, many))
    below = f"below the diagonal (losses), IPC {few.ipc} minus IPC {many.ipc}", least[0] - most[0]
    above = f"above the diagonal (losses), IPC {many.ipc} minus IPC {few.ipc}", most[1] - least[1]
    pairs = f"share of negative pairs, of {few.below.sum()},"
    return [("C2", f"{pairs} {where}", effect(more), "") for where, more in (below, above)]


def _of_comparison(record: Record) -> list[Row]:
    """What a comparison says about C4 to C8: every number of segments against one at a time."""
    table, curve, rows = comparison(record), curves(record), list[Row]()
    variants = list(table["variant"].cat.categories)
    single = next(name for name in ("K=1", "sequential") if name in variants)
    apart = np.ptp(record["config"]["probe_starts"]) >= record["config"]["expert_epochs"]  # else probes share epochs

    def add(claim: str, what: str, column: str, unit: str, pair: tuple[str, str], where: str, of: pd.DataFrame) -> None:
        rows.append((claim, f"{what}, {' minus '.join(pair)}{where}", paired(of, column, *pair), unit))

    for several in (name for name in variants if (name.startswith("K=") and name != single) or name == "concurrent"):
        less, more, compute = (single, several), (several, single), " at equal compute"
        add("C6", "test accuracy", "test", " points", more, compute, table)
        for network, theirs in transfers(record).items():
            add("C7", f"test accuracy of {network}", "test", " points", more, compute, theirs)
        for where, probes in probes_at_equal(record, less).items():
            for claim, measure in (("C5", "average forgetting"), ("C8", "mean loss of the probes"))[not apart :]:
                add(claim, measure, measure, " % of a loss of 1", less, f" {where} each", probes)
        both = curve[curve["variant"].isin(less)]
        for where, measured in at_equal(both, "error").items():
            add("C4", "accumulated error over the expert's way", "error", " %", less, f" {where} each", measured)
        for where, validated in at_equal(both, "accuracy").items():
            add("C6", "validation accuracy", "accuracy", " points", more, f" {where} each", validated)
        for remedy in sorted({"ewc", "si"} & set(variants)):
            add("C5", "test accuracy", "test", " points", (several, remedy), "", table)
    return [row for row in rows if row[2].count]


def _of_memory(record: Record) -> Row:
    """C8: memory of the largest K above the process's own, over that of K = 1; confirmed if it is below 1.1."""
    table = pd.DataFrame(record["measurements"]).query("implementation == 'cddlib, K segments'")
    groups = dict(iter(table.assign(above=table["peak_mb"] - table["start_mb"]).groupby("segments")))
    least, most = min(groups), max(groups)
    ratios = groups[most]["above"] / groups[least]["above"].mean()
    time = groups[most]["seconds"].mean() / groups[least]["seconds"].mean()
    memory = f"1.1 minus {ratios.mean():.2f}, the memory of K = {most} over that of K = {least}"
    measure = f"{memory}, one after the other; it takes {time:.1f} times as long"
    return "C8", measure, effect(1.1 - ratios), ""


def findings(
    correlation_records: Mapping[str, Record], comparison_records: Mapping[str, Record], memory: Record | None = None
) -> list[Finding]:
    """Everything that records, given by the name of their setting, say about the claims, in the claims' order.

    Without the record of `tests/benchmarks/memory.py` nothing is said of lossless sets and of memory.
    """
    studies = {setting: correlations(record) for setting, record in correlation_records.items()}
    by_data: dict[str, list[Correlations]] = {}
    for setting, study in studies.items():
        by_data.setdefault(setting.split(",")[0], []).append(study)
    found = [_of_pairs(setting, study) for setting, study in studies.items()]
    rows = [(setting, row) for setting, study in studies.items() for row in _of_correlation(study)]
    rows += [(data, row) for data, studies in by_data.items() for row in _of_images(studies)]
    rows += [(setting, row) for setting, record in comparison_records.items() for row in _of_comparison(record)]
    found += [_finding(setting, *row) for setting, row in rows]
    if memory is not None:
        needed = "lossless sets need 1,000 images a class"
        found.append(Finding(claim="C7", setting="", measure=needed, effect="", verdict="not tested"))
        found.append(_finding(f"{memory['device']}, width {memory['config']['width']}", *_of_memory(memory)))
    return sorted(found, key=lambda finding: finding.claim)


def committed_findings() -> list[Finding]:
    """`findings` of the records that are committed with the book; needs the repository around."""
    compared = {**SEGMENT_STUDIES, "digits, IPC 1": "remedies-digits-ipc1"}
    read = {setting: read_record(name) for setting, name in compared.items()}
    correlated = {setting: read_record(name) for setting, name in CORRELATION_STUDIES.items()}
    found = findings(correlated, read, read_record("memory"))
    gpu = read_record("gpu/distil"), read_record("gpu/evaluate")
    for price, at in GPU_PRICES.items():
        tests = tests_of((run, run.own["synthetic"]) for run in gpu_runs(*gpu, at))
        measure = f"test accuracy, K=2 minus K=1 {price} on a GPU"
        ahead = paired(tests, "test", "K=2", "K=1")
        found.append(_finding("CIFAR-10, IPC 1, published network", "C6", measure, ahead, " points"))
    return sorted(found, key=lambda finding: finding.claim)


def claims_table(found: Sequence[Finding], claims: Sequence[str] = tuple(CLAIMS)) -> str:
    """Markdown: each of `claims` in a sentence, and below it a row a finding."""
    rows = []
    for claim in claims:
        rows.append((f"**{claim}**", "", f"**{CLAIMS[claim]}**", "", ""))
        rows += [("", f.setting, f.measure, f.effect, f"**{f.verdict}**") for f in found if f.claim == claim]
    titles = ["claim", "setting", "measure", "effect [95 % interval]", "verdict"]
    return markdown(pd.DataFrame(rows, columns=titles))


def summary_table(found: Sequence[Finding]) -> str:
    """Markdown: a row a claim, with its first measure, of the published network or of CIFAR-10 with IPC 1 if there, and
    how many measures have which verdict; of those that confirm it, how many compare at equal iterations.
    """
    verdicts = [name for name in get_args(Verdict) if any(finding.verdict == name for finding in found)]
    counts = Counter((finding.claim, finding.verdict) for finding in found)
    rows = []
    for claim, sentence in CLAIMS.items():
        mine = sorted((f for f in found if f.claim == claim), key=lambda f: not f.setting.startswith("CIFAR-10, IPC 1"))
        mine.sort(key=lambda f: not f.setting.endswith("published network"))
        main = [f"{f.measure}: {f.effect} ({f.setting}): *{f.verdict}*" for f in mine[:1] if f.effect]
        row = {"claim": f"**{claim}** {sentence}", "main measure": "".join(main)}
        tally = {verdict: str(counts[claim, verdict]) for verdict in verdicts}
        if costlier := sum(f.verdict == "confirmed" and "iterations" in f.measure for f in mine):
            tally["confirmed"] += f" ({costlier} at equal iterations)"
        rows.append(row | tally)
    return markdown(rows)
