"""Example jobs for config.example.yaml: plain functions, called with the executor's Context when
they take an argument."""

import collections
import csv
import os
from pathlib import Path

SALES = Path(os.environ.get("SALES_CSV") or Path(__file__).parent.parent / "sales.csv")


def read(month=""):
    """The rows of one month such as "2026-10", or all."""
    with open(SALES, newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if row["day"].startswith(month)]


def main(context):
    """Print the revenue of each region; what is returned becomes the result message in the
    admin."""
    month = context.params().get("month", "")
    revenue = collections.Counter()
    for row in read(month):
        revenue[row["region"]] += int(row["pieces"]) * float(row["price"])
    for region, amount in revenue.most_common():
        print(f"{region:<8} {amount:10.2f}")
    context.log(
        f"shard {context.shard_index} of {context.shard_total}, parameter {context.param!r}"
    )
    if not revenue:
        raise ValueError(f"no sales in {month or SALES}")
    best, amount = revenue.most_common(1)[0]
    return f"{sum(revenue.values()):.2f} in all, the most in {best}: {amount:.2f}"


def check(context):
    """Look at every row, and stop soon when the run is killed or out of time."""
    rows = read()
    for number, row in enumerate(rows, 2):
        if context.cancelled.is_set():
            return f"stopped before line {number}"
        if int(row["pieces"]) < 0:
            raise ValueError(f"line {number}: {row['pieces']} pieces")
    return f"{len(rows)} rows are fine"
