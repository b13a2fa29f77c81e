"""A picture of what two runs answer: the xGQA questions on which they differ in most languages.

    python -m tools.contact_sheet RUN_A RUN_B [--out contact_sheet.png]

For example standard fine-tuning and SUF. A right answer is green with a tick, a wrong one red with
a cross. Where the machine has no font for a language (DejaVu Sans, Noto Sans CJK, Noto Sans
Bengali), a word in brackets says so.
"""

from collections import Counter

from PIL import Image, ImageDraw, ImageFont

import data
import eval as evaluation

FONTS = {  # of languages that DejaVu Sans cannot write
    "bn": "NotoSansBengali-Regular.ttf",
    "ko": "NotoSansCJK-Regular.ttc",
    "zh": "NotoSansCJK-Regular.ttc",
}
# In pixels: language, question, the answers of both runs stand right of an image. Eight images with
# ten lines each: a heading, eight languages, an empty line
COLUMNS, LINE, SIZE = (220, 260, 780, 1030), 24, (1260, 1920)
COLORS = {"✓": "green", "✗": "red"}


def choose(folder, runs):
    """-> eight questions on which the runs differ in most languages, one per image.

    Each [image, line, line, …]. A line: language, question, and both runs' answers after ✓ or ✗.
    """
    differ, found = Counter(), {}
    for language in data.LANGUAGES["xgqa"]:
        answers = []
        for run in runs:
            path = f"{run}/predictions/{language}.json"
            with data.reading(path):
                entries = data.read_json(path)
                answers.append({entry["questionId"]: entry["prediction"] for entry in entries})
        _, records = data.read_records(folder, "xgqa", "test", language)
        for record in records:
            line = [language, record.text]
            for said in answers:
                answer = said.get(record.id, "")
                mark = "✓" if answer in record.answers else "✗"
                line.append(f"{mark} {answer}")
            differ[record.id] += line[2][0] != line[3][0]
            found.setdefault(record.id, [record.image]).append(line)
    chosen = {}
    for question, _ in differ.most_common():
        image, *_ = found[question]
        chosen.setdefault(image, found[question])
    return list(chosen.values())[:8]


def font_of(language):
    """None if this machine does not have it."""
    try:
        return ImageFont.truetype(FONTS.get(language, "DejaVuSans.ttf"), 15)
    except OSError:
        return None


def main(argv=None):
    parser = evaluation.Parser(description=__doc__)
    parser.add_argument("runs", nargs=2, help="a finished run on xGQA")
    parser.add_argument("--out", default="contact_sheet.png")
    given = parser.parse_args(argv)
    args, _ = evaluation.read_run(given.runs[0])
    sheet = Image.new("RGB", SIZE, "white")
    draw = ImageDraw.Draw(sheet)
    latin = font_of("en")
    y = 0
    for image, *lines in choose(args.data, given.runs):
        # the image, and beside it the names of the runs and a line per language
        picture = data.read_image(data.image_path(args.data, "xgqa", image))
        sheet.paste(picture.resize((192, 192)), (0, y))
        for line in [["", "", *given.runs], *lines]:
            font = font_of(line[0])
            if font is None:
                line[1] = "(no font)"
            for x, text, its_font in zip(COLUMNS, line, (latin, font, latin, latin)):
                draw.text((x, y), text, COLORS.get(text[:1], "black"), its_font)
            y += LINE
        y += LINE
    sheet.save(given.out, "PNG")
    print(f"contact sheet: {given.out}")


if __name__ == "__main__":
    evaluation.command(main)
