"""A picture of what two runs answer: the xGQA questions on which they differ in most languages.

    python -m tools.contact_sheet RUN_A RUN_B [--out contact_sheet.png]

For example standard fine-tuning and SUF. A right answer is green with a tick, a wrong one red with
a cross. Where the machine has no font for a language's script, a word in brackets says so.
"""

import os
from collections import Counter

from PIL import Image, ImageDraw, ImageFont

import analysis
import data
import eval as evaluation

FONTS = [
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansBengali-Regular.ttf", "Arial Unicode.ttf",
    "msyh.ttc", "malgun.ttf", "Nirmala.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc",
]
QUESTIONS = 8
IMAGE, LINE, WIDTH = 192, 24, 1240  # pixels
COLUMNS = (220, 260, 800, 1020)  # language, question, the answers of both runs
BLACK, GREY, GREEN, RED = "#141414", "#828282", "#14782a", "#be281e"


def choose(records, runs):
    """The questions on which one run is right and the other wrong in most languages, one per image.

    records: language -> {question id: record}; runs: two of language -> {question id: answer}.
    """
    differ = Counter()
    for language, some in records.items():
        for question, record in some.items():
            right = {answers[language].get(question) in record.answers for answers in runs}
            differ[question] += len(right) - 1
    chosen = {}
    for question, _ in differ.most_common():
        chosen.setdefault(records["en"][question].image, question)
    return list(chosen.values())[:QUESTIONS]


def font_for(characters):
    """The first of FONTS on this machine that has all of the characters; None if there is none."""
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, 15)
        except OSError:  # not on this machine
            continue
        missing = bytes(font.getmask("\U0010ffff"))
        if all(bytes(font.getmask(character)) != missing for character in characters):
            return font
    return None


def main(argv=None):
    parser = evaluation.Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("runs", nargs=2, metavar="RUN", help="a finished run on xGQA")
    parser.add_argument("--out", default="contact_sheet.png", metavar="FILE")
    given = parser.parse_args(argv)

    # both runs' answers; questions and fonts of every language
    headings = ["where the two differ in most languages"]
    runs = []
    for run in given.runs:
        headings.append(analysis.label(evaluation.read_results(run)["strategy"]))
        answers = {}
        for language in data.LANGUAGES["xgqa"]:
            path = os.path.join(run, "predictions", f"{language}.json")
            with data.reading(f"{path}, of a run on xGQA"):
                entries = data.read_json(path)
                answers[language] = {entry["questionId"]: entry["prediction"] for entry in entries}
        runs.append(answers)
    args, _ = evaluation.read_run(given.runs[0])
    records = {}
    fonts = {}
    for language in data.LANGUAGES["xgqa"]:
        _, some = data.read_records(args.data, "xgqa", "test", language)
        records[language] = {record.id: record for record in some}
        texts = [record.text for record in some]
        fonts[language] = font_for(set("".join(texts).replace(" ", "")))
    latin = font_for("✓✗") or ImageFont.load_default(15)

    # for each question the image, beside it a line per language
    chosen = choose(records, runs)
    block = (len(records) + 2) * LINE
    sheet = Image.new("RGB", (WIDTH, 2 * LINE + len(chosen) * block), "white")
    draw = ImageDraw.Draw(sheet)
    for x, text in zip(COLUMNS[1:], headings):
        draw.text((x, LINE // 2), text, GREY, latin)
    for number, question in enumerate(chosen):
        y = 2 * LINE + number * block
        record = records["en"][question]
        picture = data.read_image(data.image_path(args.data, "xgqa", record.image))
        sheet.paste(picture.resize((IMAGE, IMAGE)), (LINE // 2, y))
        draw.text((COLUMNS[1], y), f"answer: {', '.join(record.answers)}", BLACK, latin)
        for language, font in fonts.items():
            y += LINE
            text = records[language][question].text if font else "(no font for this script)"
            draw.text((COLUMNS[0], y), language, GREY, latin)
            draw.text((COLUMNS[1], y), text, BLACK, font or latin)
            for x, answers in zip(COLUMNS[2:], runs):
                said = answers[language].get(question, "")
                mark, color = ("✓", GREEN) if said in record.answers else ("✗", RED)
                draw.text((x, y), f"{mark} {said}", color, latin)
    data.write(given.out, lambda file: sheet.save(file, "PNG"))
    print(f"contact sheet: {given.out}")


if __name__ == "__main__":
    evaluation.command(main)
