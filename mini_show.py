"""`python mini.py --show`: a contact sheet of the miniature's xGQA.

Scenes with questions in several languages, the right answers and those of two runs. Every language is drawn in its own
script where the machine has a font for it; where not, as the tokenizer reads it.
"""

import os

import sentencepiece
from PIL import Image, ImageDraw, ImageFont

import analysis
import data
import eval as evaluation
import files
from files import InputError
from run_folder import fingerprint

LANGUAGES = ("en", "de", "ru", "zh", "ko", "bn")
FONTS = ("NotoSansCJK-Regular.ttc", "NotoSansBengali-Regular.ttf", "DejaVuSans.ttf", "Arial Unicode.ttf", "msyh.ttc",
         "malgun.ttf", "Nirmala.ttf", "PingFang.ttc", "AppleSDGothicNeo.ttc")
SCENES, QUESTIONS_PER_SCENE = 6, 2
IMAGE, FONT_SIZE, LINE, MARGIN, WIDTH = 176, 15, 22, 16, 1240  # pixels
TWO_RUNS = "--show needs two of them: python train.py --model cclm --task xgqa, and the same with --suf"
COLUMNS = (210, 250, 720, 830, 1040)  # language, question, right answer, first run, second run
INK, GREY, RIGHT, WRONG = (20, 20, 20), (130, 130, 130), (20, 120, 40), (190, 40, 30)


def contact_sheet(world, tokenizer, runs, path):
    """Write a PNG. runs: folders of two finished xGQA runs on the miniature. InputError for anything else."""
    read = {language: data.read_records(world, "xgqa", "test", language) for language in LANGUAGES}
    shown = {f"{language}/{os.path.basename(source)}": fingerprint(source) for language, (source, _) in read.items()}
    answers, titles = zip(*(read_answers(run, shown) for run in runs))
    records = {language: {record.id: record for record in some} for language, (_, some) in read.items()}
    chosen = choose(records["en"], answers)
    normalizer = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
    fonts = {language: font_for("".join(r.text for r in list(records[language].values())[:200]))
             for language in LANGUAGES}

    def text(x, y, words, fill=INK, language="en"):
        font = fonts[language]
        if font is None:
            words, font = normalizer.normalize(words).replace("▁", " ").strip(), fonts["en"]
        draw.text((x, y + LINE - 6), words, fill=fill, font=font, anchor="ls")  # scripts share a baseline

    block = QUESTIONS_PER_SCENE * (len(LANGUAGES) + 1) * LINE
    sheet = Image.new("RGB", (WIDTH, 2 * MARGIN + 3 * LINE + len(chosen) * (block + MARGIN)), "white")
    draw = ImageDraw.Draw(sheet)
    legend = ["question", "what a model answers is green where it is right, red where not"]
    for x, lines in zip(COLUMNS[1:], (legend, ["answer"], *titles)):
        for number, line in enumerate(lines):
            text(x, MARGIN + number * LINE, line, GREY)
    y = MARGIN + 3 * LINE
    for image, questions in chosen:
        picture = data.read_image(data.image_path(world, "xgqa", image)).resize(
            (IMAGE, IMAGE), Image.Resampling.NEAREST)
        sheet.paste(picture, (MARGIN, y))
        line = y
        for question in questions:
            text(COLUMNS[2], line, ", ".join(records["en"][question].answers))
            for language in LANGUAGES:
                record = records[language][question]
                text(COLUMNS[0], line, language, GREY)
                text(COLUMNS[1], line, record.text, language=language)
                for x, run in zip(COLUMNS[3:], answers):
                    said = run[language][question]
                    text(x, line, said, RIGHT if said in record.answers else WRONG)
                line += LINE
            line += LINE
        y += block + MARGIN
    files.write(path, lambda file: sheet.save(file, "PNG", optimize=True))


def read_answers(run, shown):
    """-> ({language: {question id: answer}}, lines of its title) of a finished run.

    InputError unless it was tested on the files that are shown, by fingerprint.
    """
    if not os.path.isdir(run):
        raise InputError(f"{run}: no such run; {TWO_RUNS}")
    args, results = evaluation.read_run(run)[0], evaluation.read_results(run)
    tested = evaluation.tested_on(run)
    if args.task != "xgqa" or any(tested.get(name) != digest for name, digest in shown.items()):
        raise InputError(f"{run}: not a run on the miniature's xGQA as it is now; {TWO_RUNS}")
    paths = {language: os.path.join(run, "predictions", f"{language}.json") for language in LANGUAGES}
    answers = {language: evaluation.by_id(enumerate(evaluation.read_predictions(path)), "questionId", "prediction", str,
                                          path) for language, path in paths.items()}
    english = results["languages"]["en"]["accuracy"]
    others = evaluation.mean_zero_shot(results["languages"], "accuracy")
    strategy = files.expect(results, "strategy", str, run)
    title = [f"{args.model.upper()}, {analysis.label(strategy)}", f"test: en {english:.0f} %, others {others:.0f} %"]
    return answers, title


def choose(english, answers):
    """The first images that were asked enough, a question per type: [(image, question ids)]. Not chosen by answers."""
    by_image = {}
    for record in english.values():
        if all(record.id in languages for run in answers for languages in run.values()):
            by_image.setdefault(record.image, {}).setdefault(record.type, record.id)
    enough = [(image, list(questions.values())[:QUESTIONS_PER_SCENE]) for image, questions in sorted(by_image.items())
              if len(questions) >= QUESTIONS_PER_SCENE]
    if not enough:
        raise InputError("the two runs have not answered the miniature's questions; --show needs runs without --data")
    return enough[:SCENES]


def font_for(characters):
    """The first of FONTS on this machine that has all of the characters; None where there is none."""
    for name in FONTS:
        try:
            font = ImageFont.truetype(name, FONT_SIZE)
        except OSError:  # not on this machine
            continue
        missing = bytes(font.getmask("\U0010ffff"))
        if all(bytes(font.getmask(c)) != missing for c in set(characters) if not c.isspace()):
            return font
    return None if any(ord(c) > 255 for c in characters) else ImageFont.load_default(FONT_SIZE)
