"""A picture of what two runs answer: the xGQA questions on which they differ in most languages.

    python -m tools.contact_sheet RUN_A RUN_B [--out contact_sheet.png]

For example standard fine-tuning and SUF. A right answer is green with a tick, a wrong one red with
a cross. Where the machine has no font for a language's script, a word in brackets says so.
"""

import os

from PIL import Image, ImageDraw, ImageFont

import analysis
import data
import eval as evaluation
from data import InputError

FONTS = [
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansBengali-Regular.ttf", "Arial Unicode.ttf",
    "msyh.ttc", "malgun.ttf", "Nirmala.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc",
]
QUESTIONS = 8
IMAGE, LINE, WIDTH = 192, 24, 1240  # pixels
COLUMNS = (220, 260, 800, 1020)  # language, question, the answers of both runs
BLACK, GREY, GREEN, RED = "#141414", "#828282", "#14782a", "#be281e"


def read_answers(run):
    """-> ({language: {question id: answer}}, heading)."""
    results, answers = evaluation.read_results(run), {}
    if results["task"] != "xgqa":
        raise InputError(f"{run}: a run on {results['task']}; a contact sheet shows two on xgqa")
    for language in data.LANGUAGES["xgqa"]:
        entries = data.read_json(os.path.join(run, "predictions", f"{language}.json"))
        answers[language] = {entry["questionId"]: entry["prediction"] for entry in entries}
    english = results["languages"]["en"]["accuracy"]
    others = evaluation.mean_zero_shot(results["languages"], "accuracy")
    name = analysis.label(results["strategy"])
    return answers, f"{name}\ntest: en {english:.0f} %\nothers {others:.0f} %"


def choose(records, runs):
    """The questions on which one run is right and the other wrong in most languages, one per image.

    records: language -> {question id: record}; runs: as `read_answers` gives them. -> ids.
    """
    differ = {}
    for language, some in records.items():
        for question, record in some.items():
            right = {answers[language].get(question) in record.answers for answers in runs}
            differ[question] = differ.get(question, 0) + len(right) - 1
    chosen = {}
    for question in sorted(differ, key=lambda question: -differ[question]):
        image = records["en"][question].image
        chosen.setdefault(image, question)
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
    args, _ = evaluation.read_run(given.runs[0])
    (answers_a, heading_a), (answers_b, heading_b) = map(read_answers, given.runs)
    records, fonts = {}, {}
    for language in data.LANGUAGES["xgqa"]:
        _, some = data.read_records(args.data, "xgqa", "test", language)
        records[language] = {record.id: record for record in some}
        letters = {letter for record in some for letter in record.text}
        fonts[language] = font_for(letters - {" "})
    latin = font_for("✓✗")
    tick, cross = "✓✗" if latin else "+-"
    latin = latin or ImageFont.load_default(15)
    chosen = choose(records, [answers_a, answers_b])

    # the heading
    block = (len(records) + 2) * LINE
    sheet = Image.new("RGB", (WIDTH, 4 * LINE + len(chosen) * block), "white")
    draw = ImageDraw.Draw(sheet)
    headings = "xGQA: where the two differ in most languages", heading_a, heading_b
    for x, text in zip(COLUMNS[1:], headings):
        draw.text((x, LINE // 2), text, GREY, latin)

    for number, question in enumerate(chosen):
        y = 4 * LINE + number * block
        record = records["en"][question]
        picture = data.read_image(data.image_path(args.data, "xgqa", record.image))
        sheet.paste(picture.resize((IMAGE, IMAGE)), (LINE // 2, y))
        draw.text((COLUMNS[1], y), f"answer: {', '.join(record.answers)}", BLACK, latin)
        for language, font in fonts.items():
            y += LINE
            text = records[language][question].text
            if font is None:
                text = "(no font for this script)"
            draw.text((COLUMNS[0], y), language, GREY, latin)
            draw.text((COLUMNS[1], y), text, BLACK, font or latin)
            for x, answers in zip(COLUMNS[2:], (answers_a, answers_b)):
                said = answers[language].get(question, "")
                color, mark = RED, cross
                if said in record.answers:
                    color, mark = GREEN, tick
                draw.text((x, y), f"{mark} {said}", color, latin)
    data.write(given.out, lambda file: sheet.save(file, "PNG", optimize=True))
    print(f"contact sheet: {given.out}")


if __name__ == "__main__":
    evaluation.command(main)
