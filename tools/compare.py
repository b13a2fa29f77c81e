"""Two finished runs side by side, and the score of xGQA predictions of whatever origin.

    python -m tools.compare RUN_A RUN_B
        B - A per language and for the mean of those other than English, each with the 95 % interval
        of a paired bootstrap over test images
    python -m tools.compare --score PREDICTIONS --truth TEST.json
        accuracy of IGLUE's [{"questionId", "prediction"}] or CCLM's [{"question_id", "answer"}]

Letters: n items of one language, I images, L languages.
"""

import os
import sys

import numpy as np

import data
import eval as evaluation
from data import InputError

DRAWS = 10_000  # of the bootstrap


# --------------------------------------------------------------------------------------------------
# Two runs


def compare(run_a, run_b, data_folder=None):
    """Print a table per metric."""
    args_a, args_b = (evaluation.read_run(run, data_folder)[0] for run in (run_a, run_b))
    results_a, results_b = (evaluation.read_results(run)["languages"] for run in (run_a, run_b))
    if args_a.task != args_b.task:
        raise InputError(f"{run_a} is a run on {args_a.task}, {run_b} one on {args_b.task}")
    tested_a, tested_b = tested_on(run_a), tested_on(run_b)
    for file, digest in tested_a.items():
        if tested_b.get(file, digest) != digest:
            raise InputError(f"{run_a} and {run_b} were tested on different data (their {file} are "
                             "not the same): train one of them again")
    if args_a.model == args_b.model and first_weights(run_a) != first_weights(run_b):
        print("warning: the two runs started from different pre-trained weights, to which their "
              "difference may be due", file=sys.stderr)
    languages = [language for language in results_a if language in results_b]
    if not languages:
        raise InputError(f"{run_a} and {run_b} have no language in common")

    print(f"A: {run_a}\nB: {run_b}")
    others = [i for i, language in enumerate(languages) if language != "en"]
    for metric, heading in evaluation.headline(args_a.task):
        outcomes = []
        for language in languages:
            outcomes.append(paired_outcomes(run_a, run_b, args_a, language, metric))
        print(f"{heading:16}       A       B   B - A   95 % interval")
        lows, highs = paired_bootstrap(outcomes, DRAWS)
        for language, low, high in zip(languages, lows, highs):
            a, b = results_a[language][metric], results_b[language][metric]
            print_line(language, a, b, low, high)
        if len(others) > 1:
            low, high = paired_bootstrap(outcomes, DRAWS, others)
            means = []
            for results in (results_a, results_b):
                shared = {language: results[language] for language in languages}
                means.append(evaluation.mean_zero_shot(shared, metric))
            print_line(f"mean of {len(others)} others", *means, low, high)


def print_line(name, a, b, low, high):
    print(f"{name:16}  {a:6.2f}  {b:6.2f}  {b - a:+6.2f}  [{low:+.2f}, {high:+.2f}]")


def tested_on(run):
    """{"de/test.json": sha256, …} of the files that a run was tested on, wherever they lay."""
    found = {}
    for path, digest in evaluation.fingerprints(run).items():
        folder, name = os.path.split(path)
        if name.startswith("test."):
            found[f"{os.path.basename(folder)}/{name}"] = digest
    return found


def first_weights(run):
    """Fingerprint of the checkpoint that a run started from."""
    checkpoint = evaluation.stored(run, "args")["checkpoint"]
    return evaluation.fingerprints(run).get(checkpoint)


def paired_outcomes(run_a, run_b, args, language, metric):
    """-> (images [n], B right minus A right [n]): the image of every scored item, and -1, 0 or 1.

    args: of one of the runs. Items of text recall are images, of image recall and accuracy texts.
    """
    a, b = (outcomes_of(run, args, language, metric) for run in (run_a, run_b))
    if a.keys() != b.keys():
        raise InputError(f"{run_b}: predicts other items in {language} than {run_a}; runs with the "
                         "same --limit can be compared")
    if not a:
        raise InputError(f"{run_a}: no prediction in {language} is about the test data")
    images = [image for image, _ in a.values()]
    differences = [b[item][1] - a[item][1] for item in a]
    return np.array(images), np.array(differences, dtype=float)


def outcomes_of(run, args, language, metric):
    """{item: (its image, whether the run is right)}, from its predictions."""
    path = os.path.join(run, "predictions", f"{language}.json")
    predictions = data.read_json(path)
    outcomes = {}
    with data.reading(path):
        if args.task == "xflickrco":
            kind = "image" if metric.startswith("text") else "text"
            for entry in predictions:
                if kind in entry:
                    image = entry[kind].split("#")[0]  # a text's id: image#number
                    outcomes[entry[kind]] = (image, entry["rank"] == 0)
            return outcomes
        id_field = evaluation.ID_FIELD[args.task]
        predicted = {entry[id_field]: entry["prediction"] for entry in predictions}
    if not os.path.isdir(args.data):
        raise InputError(f"{args.data}: the runs' data, which are gone; --data tells where they "
                         "are now")
    path, records = data.read_records(args.data, args.task, "test", language)
    evaluation.warn_of_others(run, [path])
    for record in records:
        if record.id in predicted:
            right = predicted[record.id] in (record.answers or [record.label])
            outcomes[record.id] = (record.image, right)
    return outcomes


def paired_bootstrap(outcomes, draws, mean_of=None):
    """95 % percentile interval of the difference in percent: per language, or, with `mean_of`, for
    the mean over the languages of these positions.

    outcomes: per language what `paired_outcomes` gives. Whole images are drawn, with all of their
    items in all languages: the questions about an image are not independent, and neither are the
    translations of a question. A language may lack images that others have.
    """
    every = np.unique(np.concatenate([images for images, _ in outcomes]))
    count = len(every)
    # sums over the items of each image, and how many these are: [L,I]
    totals, items = [], []
    for images, differences in outcomes:
        rows = np.searchsorted(every, images)
        totals.append(np.bincount(rows, differences, count))
        items.append(np.bincount(rows, minlength=count))
    # how often each image is drawn: [draws,I]
    times = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=draws)
    with np.errstate(invalid="ignore"):  # a draw may have no image of a language
        difference = 100 * (times @ np.stack(totals).T) / (times @ np.stack(items).T)  # [draws,L]
    if mean_of is not None:
        difference = difference[:, mean_of].mean(1)  # [draws]
    return np.nanpercentile(difference, 2.5, axis=0), np.nanpercentile(difference, 97.5, axis=0)


# --------------------------------------------------------------------------------------------------
# Predictions of whatever origin


def score_file(predictions, truth):
    """Print the accuracy of a file of predictions, overall and by type of question.

    Questions without a prediction count as wrong.
    """
    predicted = read_predictions(predictions)
    with data.reading(truth):
        records = data.read_gqa(truth)
    if not records:
        raise InputError(f"{truth}: no questions")
    known = {record.id for record in records}
    missing, unknown = len(known - predicted.keys()), len(predicted.keys() - known)
    if missing:
        print(f"{missing:,} questions have no prediction and count as wrong")
    if unknown:
        print(f"{unknown:,} predictions are about other questions and are left out")
    answers = [predicted.get(record.id) for record in records]
    scores = evaluation.score(records, answers)
    for name, part in {"all": scores, **scores["by_type"]}.items():
        accuracy, n = part["accuracy"], part["n"]
        print(f"{name:8}  {accuracy:6.2f} %  ({round(accuracy * n / 100)} of {n})")


def read_predictions(path):
    """-> {question id: answer}. Ids may be numbers or strings."""
    loaded, predicted = data.read_json(path), {}
    if not isinstance(loaded, list):
        raise InputError(f"{path}: expected a list of predictions")
    for number, entry in enumerate(loaded):
        with data.reading(f"{path}, entry {number}"):
            id_field, answer_field = "questionId", "prediction"  # IGLUE's
            if "question_id" in entry:
                id_field, answer_field = "question_id", "answer"  # CCLM's
            key, answer = str(entry[id_field]), entry[answer_field]
            if predicted.setdefault(key, answer) != answer:
                raise InputError(f"{path}, entry {number}: a second prediction for question {key}")
    return predicted


def main(argv=None):
    parser = evaluation.Parser(description="Compare two runs, or score a file of predictions.")
    parser.add_argument("runs", nargs="*", help="two runs on the same task")
    parser.add_argument("--data", metavar="DIR", help="where the data of the runs are now")
    parser.add_argument("--score", metavar="PREDICTIONS", help="JSON list of xGQA predictions")
    parser.add_argument("--truth", metavar="TEST.json", help="xGQA file to score against")
    given = parser.parse_args(argv)
    if given.score and given.truth and not given.runs:
        score_file(given.score, given.truth)
    elif len(given.runs) == 2 and not (given.score or given.truth):
        compare(*given.runs, given.data)
    else:
        parser.error("give two runs, or --score PREDICTIONS --truth TEST.json")


if __name__ == "__main__":
    evaluation.command(main)
