"""Fill the parts of the README that quote results/, from results/: `python -m common.readme`."""

import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from common.report import ROOT, Table, markdown, measured, print_table
from common.statistics import FAILS, HOLDS, UNCLEAR

FASHION = "fashion-mnist"


def load_results(root: Path = ROOT, dataset: str = "digits") -> dict[str, dict[str, Any]]:
    """The committed reference run of every lesson on a data set, by lesson; digits' are in `results/` itself."""
    folder = root / "results" / ("" if dataset == "digits" else dataset)
    paths = sorted(folder.glob("[0-9][0-9]_*/results.json"))
    return {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def reference(record: dict[str, Any]) -> str:
    """One line: what the reference run was, and on which machine."""
    settings, machine = record["settings"], record["environment"]
    seeds = f"seeds {settings['seeds'][0]} to {settings['seeds'][-1]}"
    versions = f"Python {machine['python']}, PyTorch {machine['torch']}"
    return (
        f"The reference run: {settings['dataset']}, {seeds}, {record['seconds']:.0f} s after start-up on "
        f"{machine['cpu']}, {settings['jobs']} runs at a time, {versions}."
    )


def excerpt(record: dict[str, Any], name: str) -> str:
    """What the terminal shows of one experiment: its question, tables and findings, 80 columns wide."""
    entry, stream = record["experiments"][name], io.StringIO()
    console = Console(file=stream, width=80)
    console.print(entry["question"], f"\nvaries: {', '.join(entry['varies'])}", markup=False, highlight=False)
    for table in entry["table"]:
        print_table(console, Table(table["title"], table["columns"], table["rows"]))
    for finding in entry["findings"]:
        console.print(f"• {finding}", markup=False, highlight=False)
    lines = [line.rstrip() for line in stream.getvalue().splitlines()]
    return "```text\n" + re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n```"


def verdicts(record: dict[str, Any]) -> str:
    """How many claims got which verdict, and the claims themselves."""
    claims = record["claims"]
    hold, fail, unclear = (sum(claim["verdict"] == each for claim in claims) for each in (HOLDS, FAILS, UNCLEAR))
    rows = [
        [claim["statement"], claim["source"], measured(claim), claim["expected"], claim["verdict"]] for claim in claims
    ]
    table = Table("Verdicts", ["claim", "source", "measured", "expected", "verdict"], rows)
    return (
        f"Of {len(claims)} rules of thumb {hold} hold here, {fail} do not, {unclear} are unclear.\n\n"
        + markdown(table).partition("\n\n")[2]
    )


def two_verdicts(record: dict[str, Any], other: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each claim of a lesson on one data set beside the same claim on another."""
    others = {claim["id"]: claim for claim in other["claims"]}
    return [(claim, others[claim["id"]]) for claim in record["claims"]]


def differences(record: dict[str, Any], other: dict[str, Any]) -> str:
    """The claims of a lesson whose verdict on Fashion-MNIST (`other`) is not that on digits, opposite ones first."""
    pairs = [pair for pair in two_verdicts(record, other) if pair[0]["verdict"] != pair[1]["verdict"]]
    pairs.sort(key=lambda pair: UNCLEAR in (pair[0]["verdict"], pair[1]["verdict"]))
    rows = []
    for claim, fashion in pairs:
        statement = claim["statement"]
        if fashion["statement"] != statement:  # it names the best of several arms
            statement += f"; on Fashion-MNIST: {fashion['statement']}"
        cells = [f"{measured(each)}: {each['verdict']}" for each in (claim, fashion)]
        rows.append([statement, claim["expected"], *cells])
    if not rows:
        return "Every verdict is the same."
    return markdown(Table("", ["claim", "expected", "digits", "Fashion-MNIST"], rows)).partition("\n\n")[2]


def agreement(results: dict[str, dict[str, Any]], fashion: dict[str, dict[str, Any]]) -> str:
    """For each lesson how many of its claims have the same verdict on both data sets, how many the opposite, and how
    many are decided on one only.
    """
    rows = []
    for lesson, record in results.items():
        pairs = [(a["verdict"], b["verdict"]) for a, b in two_verdicts(record, fashion[lesson])]
        same = sum(a == b for a, b in pairs)
        opposite = sum(a != b and UNCLEAR not in (a, b) for a, b in pairs)
        rows.append([record["title"], *map(str, (len(pairs), same, opposite, len(pairs) - same - opposite))])
    totals = [str(sum(int(row[i]) for row in rows)) for i in range(1, 5)]
    heads = ["lesson", "claims", "same verdict", "opposite", "decided on one only"]
    return markdown(Table("", heads, [*rows, ["all", *totals]])).partition("\n\n")[2]


def blocks(results: dict[str, dict[str, Any]], fashion: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Every generated block of the README by the name in its markers, from the runs on digits and on Fashion-MNIST."""
    made = {"agreement": agreement(results, fashion)}
    for lesson, record in fashion.items():
        made[f"{FASHION} {lesson[:2]}"] = differences(results[lesson], record)
        made[f"{FASHION} reference {lesson[:2]}"] = reference(record)
    for lesson, record in results.items():
        number = lesson[:2]
        made[f"reference {number}"] = reference(record)
        made[f"verdicts {number}"] = verdicts(record)
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
    readme.write_text(
        fill(readme.read_text(encoding="utf-8"), blocks(load_results(), load_results(dataset=FASHION))),
        encoding="utf-8",
    )
