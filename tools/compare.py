"""Two finished runs side by side, and the score of xGQA predictions of whatever origin.

    python -m tools.compare RUN_A RUN_B
        B - A per language and for the mean of those other than English, each with the 95 % interval
        of a paired bootstrap over test images
    python -m tools.compare --score PREDICTIONS --truth TEST.json
        accuracy of IGLUE's [{"questionId", "prediction"}] or CCLM's [{"question_id", "answer"}]

Letters: n items of one language, I images, L languages.
"""

import sys

import numpy as np

import data
import eval as evaluation
from data import InputError

# --------------------------------------------------------------------------------------------------
# Two runs


def compare(run_a, run_b, data_folder=None):
    """Print a table per metric."""
    args, _ = evaluation.read_run(run_a, data_folder)
    # what both have read, and above all the files that both were tested on
    read_a = evaluation.fingerprints(run_a)
    read_b = evaluation.fingerprints(run_b)
    tests = [file for file in read_a if "/test." in file and file in read_b]
    if not tests or any(read_a[file] != read_b[file] for file in tests):
        raise InputError(f"{run_a} and {run_b} were tested on different data")
    if set(read_a.values()) != set(read_b.values()):
        print("warning: the two runs read different files (pre-trained weights, tokenizer or "
              "training data), to which their difference may be due", file=sys.stderr)

    print(f"A: {run_a}\nB: {run_b}")
    results_a = evaluation.read_results(run_a)["languages"]
    results_b = evaluation.read_results(run_b)["languages"]
    languages = [language for language in results_a if language in results_b]
    names = [*languages, f"mean of {len(languages) - 1} others"]
    for metric, heading in evaluation.headline(args.task):
        # of every language both scores, and the differences by item
        a, b, outcomes = [], [], []
        for language in languages:
            a.append(results_a[language][metric])
            b.append(results_b[language][metric])
            outcomes.append(paired_outcomes(run_a, run_b, args, language, metric))
        drawn = paired_bootstrap(outcomes)
        # their means over the languages other than English, which comes first
        a.append(np.mean(a[1:]))
        b.append(np.mean(b[1:]))
        drawn = np.column_stack((drawn, drawn[:, 1:].mean(1)))
        limits = np.nanpercentile(drawn, [2.5, 97.5], axis=0)
        print(f"{heading:16}       A       B   B - A   95 % interval")
        for name, x, y, low, high in zip(names, a, b, *limits):
            print(f"{name:16}  {x:6.2f}  {y:6.2f}  {y - x:+6.2f}  [{low:+.2f}, {high:+.2f}]")


def paired_outcomes(run_a, run_b, args, language, metric):
    """-> (images [n], B right minus A right [n]): the image of every scored item, and -1, 0 or 1.

    args: of one of the runs. Items of text recall are images, of image recall and accuracy texts.
    """
    a = outcomes_of(run_a, args, language, metric)
    b = outcomes_of(run_b, args, language, metric)
    if a.keys() != b.keys():
        raise InputError(f"{run_b}: predicts other items in {language} than {run_a}; runs with the "
                         "same --limit can be compared")
    images, differences = [], []
    for item, (image, right) in a.items():
        images.append(image)
        differences.append(b[item][1] - right)
    return images, differences


def outcomes_of(run, args, language, metric):
    """{item: (its image, whether the run is right)}, from its predictions."""
    path = f"{run}/predictions/{language}.json"
    predictions = data.read_json(path)
    outcomes = {}
    if args.task == "xflickrco":
        kind = "image" if metric.startswith("text") else "text"
        for entry in predictions:
            if kind in entry:
                item = entry[kind]
                image = item.split("#")[0]  # a text's id: image#number
                outcomes[item] = (image, entry["rank"] == 0)
        return outcomes
    truth, records = data.read_records(args.data, args.task, "test", language)
    evaluation.warn_of_others(run, [truth])
    record_of = {record.id: record for record in records}
    with data.reading(f"{path}, beside {truth}"):
        for entry in predictions:
            record = record_of[entry[evaluation.ID_FIELD[args.task]]]
            right = entry["prediction"] in (record.answers or [record.label])
            outcomes[record.id] = (record.image, right)
    return outcomes


def paired_bootstrap(outcomes, draws=10_000):
    """Differences in percent, with other images in the test set: [draws,L].

    outcomes: per language what `paired_outcomes` gives. Whole images are drawn, with all of their
    items in all languages: the questions about an image are not independent, and neither are the
    translations of a question. A language may lack images that others have. It is NaN where none
    of its images is drawn.
    """
    every = set()
    for images, _ in outcomes:
        every.update(images)
    every = sorted(every)
    count = len(every)
    # how often each image is drawn: [draws,I]
    times = np.random.default_rng(0).multinomial(count, [1 / count] * count, size=draws)
    columns = []
    for images, differences in outcomes:
        # of each image the sum over its items, and their number: [I]
        rows = np.searchsorted(every, images)
        total = np.bincount(rows, differences, count)
        items = np.bincount(rows, minlength=count)
        with np.errstate(invalid="ignore"):
            columns.append(100 * (times @ total) / (times @ items))  # [draws]
    return np.stack(columns, 1)


# --------------------------------------------------------------------------------------------------
# Predictions of whatever origin


def score_file(predictions, truth):
    """Print the accuracy of a file of predictions, overall and by type of question.

    Questions without a prediction count as wrong. Ids may be numbers or strings.
    """
    predicted = {}
    with data.reading(predictions):
        for entry in data.read_json(predictions):
            if "questionId" in entry:  # IGLUE's
                predicted[str(entry["questionId"])] = entry["prediction"]
            else:  # CCLM's
                predicted[str(entry["question_id"])] = entry["answer"]
    with data.reading(truth):
        records = data.read_gqa(truth)
        answers = [predicted.get(record.id) for record in records]
        scores = evaluation.score(records, answers)
    print(f"{answers.count(None):,} questions have no prediction and count as wrong")
    for name, part in {"all": scores, **scores["by_type"]}.items():
        accuracy, n = part["accuracy"], part["n"]
        print(f"{name:8}  {accuracy:6.2f} %  ({round(accuracy * n / 100)} of {n})")


def main(argv=None):
    parser = evaluation.Parser(description="Compare two runs, or score a file of predictions.")
    add = parser.add_argument
    add("runs", nargs="*", help="two runs on the same task")
    add("--data", help="where the data of the runs are now")
    add("--score", metavar="PREDICTIONS", help="JSON list of xGQA predictions")
    add("--truth", metavar="TEST.json", help="xGQA file to score against")
    given = parser.parse_args(argv)
    if given.score and given.truth:
        score_file(given.score, given.truth)
    elif len(given.runs) == 2:
        compare(*given.runs, given.data)
    else:
        parser.error("give two runs, or --score PREDICTIONS --truth TEST.json")


if __name__ == "__main__":
    evaluation.command(main)
