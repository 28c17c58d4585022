"""Fill the parts of the README that quote results/, from results/: `python -m docs.readme`.

What is chosen by hand is in docs/editorial.py. A sentence there names the verdicts that it needs; when a new
reference run overturns one, this refuses to write, and the sentence must go.
"""

import json
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

from common.report import measured
from common.statistics import FAILS, HOLDS, UNCLEAR
from docs.editorial import CHEAT_SHEET, CRITICAL, FINDINGS, LESSONS
from docs.record import ROOT

FASHION = "fashion-mnist"
Record = dict[str, Any]  # a results.json


def load_results(root: Path = ROOT, dataset: str = "digits") -> dict[str, Record]:
    """The committed reference run of every lesson on a data set, by lesson; digits' are in `results/` itself."""
    folder = root / "results" / ("" if dataset == "digits" else dataset)
    found = {}
    for path in sorted(folder.glob("[0-9][0-9]_*/results.json")):
        found[path.parent.name] = json.loads(path.read_text(encoding="utf-8"))
    return found


def reference(record: Record) -> str:
    """One line: what the reference run was, and on which machine."""
    settings, machine = record["settings"], record["environment"]
    seeds = f"seeds {settings['seeds'][0]} to {settings['seeds'][-1]}"
    versions = f"Python {machine['python']}, PyTorch {machine['torch']}"
    larger = settings["larger"]
    size = f", training sets {larger} times as large" if larger != 1 else ""
    return (
        f"The reference run: {settings['dataset']}{size}, {seeds}, {record['seconds']:.0f} s after start-up on "
        f"{machine['machine']}, {versions}."
    )


def excerpt(record: Record, name: str) -> str:
    """What the terminal shows of one experiment: its question, tables and verdicts, 80 columns wide."""
    entry = record["experiments"][name]
    return f"```text\n{textwrap.fill(entry['question'], 80)}\n{entry['printed'].strip()}\n```"


def two_verdicts(record: Record, other: Record) -> list[tuple[Record, Record]]:
    """Each claim of a lesson on one data set beside the same claim on another."""
    others = {claim["id"]: claim for claim in other["claims"]}
    return [(claim, others[claim["id"]]) for claim in record["claims"]]


def beginning(record: Record, statement: str) -> Record:
    """The lesson's one claim that begins with `statement`. Raises LookupError if there is none, or several."""
    found = [claim for claim in record["claims"] if claim["statement"].startswith(statement)]
    if len(found) != 1:
        raise LookupError(f"{len(found)} claims of lesson {record['lesson']} begin with {statement!r}")
    return found[0]


def supported(record: Record, rests_on: dict[str, str]) -> list[Record]:
    """The claims that a sentence rests on. Raises ValueError if a verdict is not the one that the sentence needs."""
    claims = [beginning(record, statement) for statement in rests_on]
    for claim, verdict in zip(claims, rests_on.values(), strict=True):
        if claim["verdict"] != verdict:
            raise ValueError(f"lesson {record['lesson']}: a sentence needs {claim['statement']!r} to be: {verdict}")
    return claims


def on_both(claim: Record, fashion: Record) -> str:
    """A claim in one line: what was measured and the verdict, on digits and on Fashion-MNIST."""
    other = next(each for each in fashion["claims"] if each["id"] == claim["id"])
    sets = {"digits": claim, "clothes": other}
    told = "; ".join(f"{name} {measured(each)}, {each['verdict']}" for name, each in sets.items())
    return f"*{claim['statement']}*: {told}"


def lesson_table(results: dict[str, Record]) -> str:
    """The lessons, with what each is about, how long it takes, its headline result and its command."""
    rows = []
    for lesson, record in results.items():
        about = LESSONS[lesson[:2]]
        claim = beginning(record, about.headline)
        result = f"“{claim['statement']}”: {measured(claim)}, {claim['verdict']}"
        time = f"{about.minutes} min; runs {record['seconds']:.0f} s"
        link = f"[{lesson[:2]} {about.name}](#{anchor(lesson)})"
        rows.append([link, about.question, time, about.difficulty, result, f"`python {lesson}.py`"])
    heads = ["lesson", "question", "time", "difficulty", "headline result", "command"]
    return left_aligned(heads, rows)


def anchor(lesson: str) -> str:
    """The anchor of a lesson's section in the README."""
    return f"{lesson[:2]}-{LESSONS[lesson[:2]].name}".lower().replace(" ", "-")


def left_aligned(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of words."""
    lines = ["| " + " | ".join(heads) + " |", "| :-- " * len(heads) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows])


def findings(record: Record, fashion: Record) -> str:
    """The lesson's three findings, each with the claims that it rests on."""
    lines = []
    for finding in FINDINGS[record["lesson"][:2]]:
        claims = supported(record, finding.rests_on)
        supported(fashion, finding.on_clothes or {})
        lines.append(f"- **{finding.sentence}**")
        lines += [f"  - {on_both(claim, fashion)}" for claim in claims]
    return "\n".join(lines)


def cheat_sheet(results: dict[str, Record], fashion: dict[str, Record]) -> str:
    """For each hyper-parameter the folk rule and what the runs support; and, folded away, the claims that say so."""
    by_number = {lesson[:2]: (record, fashion[lesson]) for lesson, record in results.items()}
    rows, reasons = [], []
    for setting, folklore, advice, rests_on in CHEAT_SHEET:
        rows.append([f"**{setting}**", folklore, advice])
        reasons.append(f"- **{setting}**")
        for number, statements in rests_on.items():
            record, other = by_number[number]
            reasons += [f"  - {number}: {on_both(claim, other)}" for claim in supported(record, statements)]
    table = left_aligned(["", "the folk rule", "what the runs support"], rows)
    summary = "<summary>The verdicts behind each line</summary>"
    return "\n\n".join([table, f"<details>\n{summary}", "\n".join(reasons), "</details>"])


def critical(results: dict[str, Record]) -> str:
    """The study guide's four critical experiments: where they are, what the guide expects, and what happened."""
    by_number = {lesson[:2]: (lesson, record) for lesson, record in results.items()}
    rows = []
    for title, number, experiment, expects in CRITICAL:
        lesson, record = by_number[number]
        told = []
        for expected, statement in expects.items():
            claim = beginning(record, statement)
            told.append(f"{expected}: **{claim['verdict']}** ({measured(claim)})")
        links = ", ".join(f"[{name}](results/{lesson}/summary.md#{name})" for name in experiment.split())
        rows.append([f"{title} ({links})", "<br>".join(told), f"`python {lesson}.py --only {experiment}`"])
    return left_aligned(["experiment", "what the study guide expects, and what happened", "command"], rows)


def board(record: Record, fashion: Record) -> str:
    """Every claim of a lesson, its source, the measured effect and the verdict on both data sets; verdicts that are not
    the same are set in bold.
    """
    rows = []
    for claim, other in two_verdicts(record, fashion):
        mark = "" if claim["verdict"] == other["verdict"] else "**"
        statement = claim["statement"]
        if other["statement"] != statement:  # it names the best of several arms
            statement += f"; on clothes: {other['statement']}"
        cells = [f"{measured(each)}: {mark}{each['verdict']}{mark}" for each in (claim, other)]
        rows.append([statement, claim["source"], claim["expected"], *cells])
    return left_aligned(["claim", "source", "expected", "digits", "Fashion-MNIST"], rows)


def counts(results: dict[str, Record], fashion: dict[str, Record]) -> str:
    """For each lesson how many of its claims hold, do not and are unclear on each data set, and for how many the two
    verdicts are the same, the opposite, or decided on one only.
    """
    rows = []
    for lesson, record in results.items():
        pairs = [(a["verdict"], b["verdict"]) for a, b in two_verdicts(record, fashion[lesson])]
        tallies = [[sum(pair[i] == each for pair in pairs) for each in (HOLDS, FAILS, UNCLEAR)] for i in (0, 1)]
        same = sum(a == b for a, b in pairs)
        opposite = sum({a, b} == {HOLDS, FAILS} for a, b in pairs)
        rows.append([len(pairs), *tallies[0], *tallies[1], same, opposite, len(pairs) - same - opposite])
    rows.append([sum(column) for column in zip(*rows, strict=True)])
    names = [f"[{lesson[:2]} {LESSONS[lesson[:2]].name}](#{anchor(lesson)})" for lesson in results] + ["**all**"]
    cells = [
        [name, str(n), f"{a} / {b} / {c}", f"{d} / {e} / {f}", *map(str, rest)]
        for name, (n, a, b, c, d, e, f, *rest) in zip(names, rows, strict=True)
    ]
    outcomes = "hold / do not / unclear"
    heads = [
        "lesson",
        "claims",
        f"digits: {outcomes}",
        f"Fashion-MNIST: {outcomes}",
        "same verdict",
        "opposite",
        "decided on one only",
    ]
    return left_aligned(heads, cells)


def opposites(results: dict[str, Record], fashion: dict[str, Record]) -> str:
    """The claims that hold on one data set and do not hold on the other."""
    rows = []
    for lesson, record in results.items():
        for claim, other in two_verdicts(record, fashion[lesson]):
            if {claim["verdict"], other["verdict"]} == {HOLDS, FAILS}:
                cells = [f"{measured(each)}: {each['verdict']}" for each in (claim, other)]
                rows.append([lesson[:2], claim["statement"], claim["expected"], *cells])
    return left_aligned(["lesson", "claim", "expected", "digits", "Fashion-MNIST"], rows) if rows else "None."


def totals(results: dict[str, Record]) -> str:
    """How many claims there are, and how many of them hold on the digits."""
    verdicts = [claim["verdict"] for record in results.values() for claim in record["claims"]]
    hold, fail, unclear = (verdicts.count(each) for each in (HOLDS, FAILS, UNCLEAR))
    return f"Of {len(verdicts)} claims {hold} hold on the digits, {fail} do not, and {unclear} are unclear."


def blocks(results: dict[str, Record], fashion: dict[str, Record]) -> dict[str, str]:
    """Every generated block of the README by the name in its markers, from the runs on digits and on Fashion-MNIST."""
    made = {
        "lessons": lesson_table(results),
        "totals": totals(results),
        "counts": counts(results, fashion),
        "opposites": opposites(results, fashion),
        "cheat sheet": cheat_sheet(results, fashion),
        "critical experiments": critical(results),
    }
    for lesson, record in results.items():
        number = lesson[:2]
        made[f"reference {number}"] = reference(record)
        made[f"{FASHION} reference {number}"] = reference(fashion[lesson])
        made[f"findings {number}"] = findings(record, fashion[lesson])
        made[f"board {number}"] = board(record, fashion[lesson])
        for name in record["experiments"]:
            made[f"excerpt {number} {name}"] = excerpt(record, name)
    return made


def fill(text: str, made: dict[str, str]) -> str:
    """The README with each `<!-- begin: NAME -->` … `<!-- end -->` filled anew. Raises KeyError for an unknown name."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- begin: {match[1]} -->\n{made[match[1]]}\n<!-- end -->"

    return re.sub(r"<!-- begin: (.+?) -->\n.*?<!-- end -->", block, text, flags=re.DOTALL)


if __name__ == "__main__":
    readme = ROOT / "README.md"
    try:
        text = fill(readme.read_text(encoding="utf-8"), blocks(load_results(), load_results(dataset=FASHION)))
    except (ValueError, LookupError) as error:
        sys.exit(f"error: {error.args[0]}; README.md is as it was")
    readme.write_text(text, encoding="utf-8")
