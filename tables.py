"""Statistics over seeds, and tables as text, CSV, Markdown and PNG: what analysis.py counts with and writes.

A cell of a `Table` is a string, a number, a `Summary` over seeds or a paired `Difference`. Text and Markdown show
mean ± standard deviation (number of seeds) and difference [95 % interval]; CSV has all of their numbers, in columns of
their own. matplotlib is an optional package, for the figures alone.
"""

import csv
import io
import math
import os
import statistics
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

import files

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


class Summary(NamedTuple):
    mean: float
    sd: float  # of a sample, n - 1 in the denominator; 0 for one value
    n: int


class Difference(NamedTuple):
    """Mean of `n` paired differences with its 95 % interval (None where there is none); how many were positive."""

    mean: float
    low: float | None
    high: float | None
    n: int
    positive: int

    @property
    def shown(self):
        """Whether the interval leaves out 0."""
        return self.low is not None and (self.low > 0 or self.high < 0)


def summarize(values):
    values = list(values)
    return Summary(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0, len(values))


# 97.5 % quantiles of Student's t with 1, 2, 3 … 30 degrees of freedom
T_QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
               2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042)


def t_interval(differences):
    """Mean of paired differences with the two-sided 95 % interval of Student's t with n - 1 degrees of freedom.

    Beyond 30 degrees of freedom the quantile of 30 is used: a little too wide. One difference has no interval.
    """
    mean, sd, n = summarize(differences)
    positive = sum(difference > 0 for difference in differences)
    if n == 1:
        return Difference(mean, None, None, 1, positive)
    half = T_QUANTILES[min(n - 1, len(T_QUANTILES)) - 1] * sd / math.sqrt(n)
    return Difference(mean, mean - half, mean + half, n, positive)


def sign_test(differences):
    """Two-sided p of that many differences of one sign, were both equally likely. Zeros are left out; 1 if all are."""
    signs = [difference > 0 for difference in differences if difference != 0]
    extreme = max(sum(signs), len(signs) - sum(signs))
    tail = sum(math.comb(len(signs), k) for k in range(extreme, len(signs) + 1)) / 2 ** len(signs)
    return min(1.0, 2 * tail)


def pearson(x, y):
    """Correlation; None where one of the two does not vary, or there are fewer than three pairs."""
    x, y = np.asarray(x, float) - np.mean(x), np.asarray(y, float) - np.mean(y)
    scale = math.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / scale) if len(x) > 2 and scale > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# Tables


@dataclass
class Table:
    name: str  # of its files
    title: str
    rows: list  # {column: cell}; the first column, "", names the row
    notes: list = field(default_factory=list)
    panels: list = field(default_factory=list)  # of its figure, as `draw` takes them
    digits: int = 1

    def cells(self):
        """-> the header and the rows, as text."""
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        return [columns, *([cell(row.get(column), self.digits) for column in columns] for row in self.rows)]


def cell(content, digits):
    if content is None:
        return ""
    if isinstance(content, Summary):
        spread = f" ± {content.sd:.{digits}f} ({content.n})" if content.n > 1 else ""
        return f"{content.mean:.{digits}f}{spread}"
    if isinstance(content, Difference):
        interval = "" if content.low is None else f" [{content.low:+.{digits}f}, {content.high:+.{digits}f}]"
        return f"{content.mean:+.{digits}f}{interval}"
    return f"{content:.{digits}f}" if isinstance(content, float) else str(content)


def publish(table, out):
    """Print a table, write its CSV file and its figure to the folder `out`. -> its Markdown."""
    with files.writing(out):
        os.makedirs(out, exist_ok=True)
    print(f"\n{as_text(table)}")
    write_csv(table, os.path.join(out, f"{table.name}.csv"))
    drawn = bool(table.panels) and draw(table, os.path.join(out, f"{table.name}.png"))
    return as_markdown(table, drawn)


def as_text(table):
    cells = table.cells()
    first, *widths = [max(map(len, column)) for column in zip(*cells)]
    lines = ["  ".join([row[0].ljust(first), *(text.rjust(width) for text, width in zip(row[1:], widths))])
             for row in cells]
    return "\n".join([table.title, *lines, *(f"* {note}" for note in table.notes)])


def as_markdown(table, drawn):
    header, *rows = (f"| {' | '.join(row)} |" for row in table.cells())
    lines = [f"**{table.title}**", "", header, "|---|" + "---:|" * (len(table.cells()[0]) - 1), *rows, ""]
    lines += [*(f"- {note}" for note in table.notes), ""] if table.notes else []
    return "\n".join([*lines, f"![{table.title}]({table.name}.png)", ""] if drawn else lines) + "\n"


def write_csv(table, path):
    rows = []
    for row in table.rows:
        rows.append({})
        for column, content in row.items():
            if isinstance(content, (Summary, Difference)):  # the mean under the column's name, the rest beside it
                parts = content._asdict()
                rows[-1] |= {column: parts.pop("mean")} | {f"{column} {name}": part for name, part in parts.items()}
            else:
                rows[-1][column] = content
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(column for row in rows for column in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, lambda file: file.write(text.getvalue().encode()))


def draw(table, path):
    """Draw a table's panels side by side, as PNG. -> whether it could: a line says that matplotlib is not installed.

    A panel is {"title", "lines": {label: (x, y)}, "x", "y": labels of the axes}, or {"title", "labels", "matrix"} in
    percent.
    """
    try:
        import matplotlib
    except ImportError:
        print(f"no {path}: matplotlib is not installed (pip install matplotlib)")
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    columns = min(4, len(table.panels))
    rows = -(-len(table.panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(max(6, 4.4 * columns), 3.8 * rows), squeeze=False,
                                   layout="constrained")
    values = [value for panel in table.panels if "lines" in panel for _, y in panel["lines"].values() for value in y]
    for axis, panel in zip(axes.flat, table.panels):
        axis.set_title(panel["title"], fontsize=11)
        if "lines" in panel:
            draw_lines(axis, panel)
            axis.set_ylim(min(values) - 2, max(values) + 2)  # the same in all panels
        else:
            draw_matrix(axis, panel)
    for axis in list(axes.flat)[len(table.panels):]:
        axis.axis("off")
    if values:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside right center", fontsize=9)
    figure.suptitle(table.title, fontsize=12, wrap=True)
    files.write(path, lambda file: figure.savefig(file, dpi=150, format="png"))
    pyplot.close(figure)
    return True


def draw_lines(axis, panel):
    for name, (x, y) in panel["lines"].items():
        style = {"color": "black", "linewidth": 3} if name == "others" else {}
        axis.plot(x, y, marker="o", markersize=4, label=name, **style)
    axis.set_xticks(sorted({number for x, _ in panel["lines"].values() for number in x}))
    axis.set_xlabel(panel["x"])
    axis.set_ylabel(panel["y"])
    axis.grid(alpha=0.3)


def draw_matrix(axis, panel):
    axis.imshow(panel["matrix"], vmin=0, vmax=100, cmap="viridis")
    axis.set_xticks(range(len(panel["labels"])), panel["labels"])
    axis.set_yticks(range(len(panel["labels"])), panel["labels"])
    for i, row in enumerate(panel["matrix"]):
        for j, number in enumerate(row):
            color = "white" if number < 60 else "black"
            axis.text(j, i, f"{number:.0f}", ha="center", va="center", fontsize=8, color=color)
