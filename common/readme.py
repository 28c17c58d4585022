"""Fill the parts of the README that quote results/, from results/: `python -m common.readme`."""

import io
import json
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from common.report import ROOT, Table, markdown, measured, print_table
from common.statistics import FAILS, HOLDS, UNCLEAR


def load_results(root: Path = ROOT) -> dict[str, dict[str, Any]]:
    """The committed reference run of every lesson, by lesson."""
    paths = sorted((root / "results").glob("[0-9][0-9]_*/results.json"))
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


def blocks(results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Every generated block of the README by the name in its markers."""
    made = {}
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
    readme.write_text(fill(readme.read_text(encoding="utf-8"), blocks(load_results())), encoding="utf-8")
