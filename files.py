"""Files of whatever origin -> plain Python values, or one line that says what is wrong with them.

Everything a user brings goes through here: JSON, JSON lines, pickles, numpy arrays. Nothing in a file is executed,
nothing damaged is accepted in silence, and every complaint is an `InputError`: which file, which record, what was
expected.
"""

import codecs
import contextlib
import io
import json
import math
import os
import pickle
import re
import reprlib
import shutil
import stat
import warnings

import numpy as np


class InputError(ValueError):
    """What a user gave cannot be used. One line: which file, which record, what was expected, what to do."""

    def __init__(self, message):
        super().__init__(one_line(message))


def one_line(message):
    """One line of at most 1,000 characters, whatever a message quotes from a file: line breaks, endless strings."""
    message = "".join(character if character.isprintable() else " " for character in message)
    return message if len(message) <= 1000 else f"{message[:900]} … {message[-97:]}"


def at_once(path, flags):
    """Opener of `read_bytes`: opening a named pipe would wait for whoever writes to it, perhaps forever."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has neither


def read_bytes(path):
    try:
        with open(path, "rb", opener=at_once) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # devices have no end
                raise InputError(f"{path}: a pipe or a device; copy what comes out of it to a file and name that")
            return file.read()
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except MemoryError:
        raise InputError(f"{path}: too large to read") from None


def parse_json(content, where):
    """bytes -> Python; InputError with the position for what is not UTF-8 or not JSON, and for a key given twice."""

    def unique(pairs):
        found = dict(pairs)
        if len(found) != len(pairs):
            seen = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))
            raise InputError(f"{where}: the key {twice!r} stands twice in one object")
        return found

    def no_number(name):
        raise InputError(f"{where}: {name} is not a JSON number")

    if not content.strip():
        raise InputError(f"{where}: empty")
    if content.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"{where}: starts with a byte order mark; save it as UTF-8 without one")
    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=no_number)
    except UnicodeDecodeError as error:
        raise InputError(f"{where}: not UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: malformed JSON at line {error.lineno} column {error.colno} ({error.msg})") from None
    except (RecursionError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: JSON that cannot be read ({type(error).__name__}: {error})") from None


def read_json(path):
    return parse_json(read_bytes(path), path)


def read_jsonl(path):
    """-> [(line number, record)]; empty lines are not records."""
    lines = read_bytes(path).split(b"\n")
    return [(number, parse_json(line, f"{path}, line {number}"))
            for number, line in enumerate(lines, start=1) if line.strip()]


class PickledArray(list):
    """A numpy array in a pickle, as a (nested) list: rebuilt from type, shape and bytes, not by what the file calls."""

    def __init__(self, *_):
        super().__init__()

    def __setstate__(self, state):
        _, shape, kind, columns_first, content = state
        if self:  # or an array of objects could be filled with itself, twice as large each time
            raise InputError("fills an array that has its content already")
        if not isinstance(shape, list) or len(shape) > 2 or any(type(n) is not int or n < 0 for n in shape):
            raise InputError(f"holds an array of shape {shorten(shape)}; at most two dimensions are accepted")
        if kind.code.startswith("O"):  # an array of Python objects comes as a list of them
            if not isinstance(content, list) or len(content) != math.prod(shape):
                raise InputError(f"holds an array of objects that does not fill its shape {shorten(shape)}")
            self.extend(content)
        else:
            values = np.frombuffer(raw_bytes(content), kind.dtype()).reshape(shape, order="F" if columns_first else "C")
            self.extend(np.atleast_1d(values).tolist() if values.size else [])


class PickledType:
    """The type of such an array: a letter, a width and a byte order."""

    def __init__(self, code, *_):
        self.code, self.order = code, "<"

    def __setstate__(self, state):
        self.order = state[1]

    def dtype(self):
        if not re.fullmatch("b1|[iu][1248]|f[248]", self.code) or self.order not in ("<", ">", "|", "="):
            raise InputError(f"holds an array of type {shorten(self.order)} {shorten(self.code)}; only arrays of "
                             "numbers are accepted")
        return np.dtype(self.order + self.code)


def raw_bytes(content, *_):
    return content.encode("latin-1") if isinstance(content, str) else content  # older protocols write bytes as text


def pickled_number(kind, content):
    return np.frombuffer(raw_bytes(content), kind.dtype())[0].item()


REBUILT = {("numpy", "ndarray"): None, ("numpy", "dtype"): PickledType, ("_codecs", "encode"): raw_bytes,
           ("numpy.core.multiarray", "_reconstruct"): PickledArray,
           ("numpy.core.multiarray", "scalar"): pickled_number,
           ("numpy._core.multiarray", "_reconstruct"): PickledArray,
           ("numpy._core.multiarray", "scalar"): pickled_number}


class PlainUnpickler(pickle._Unpickler):
    """Lists, dicts, strings, numbers, and numpy arrays as lists. Nothing that a file names is imported or called.

    The unpickler that Python keeps beside the one in C (9 s slower on GQA's 943,000 questions), with the operations
    that such data need and no other: a file of a few bytes can make the one in C fill the memory or crash. Tuples
    become lists, so no key of a dict can be one.
    """

    def __init__(self, content):
        super().__init__(io.BytesIO(content), encoding="latin-1")
        self.left = 2 * len(content)

    def spend(self, count):
        """Count the elements of arrays and the bytes made of text: each takes a byte of a sound file.

        A file that uses its bytes again and again could fill the memory.
        """
        self.left -= count
        if self.left < 0:
            raise InputError("makes more of its bytes than a file of arrays does")

    def find_class(self, module, name):
        if (module, name) not in REBUILT:
            raise InputError(f"refers to {module}.{name}; "
                             "only plain lists, dicts, strings, numbers and arrays are accepted")
        return REBUILT[module, name]

    def call(self):
        function, arguments = self.stack[-2], self.stack.pop()
        if function not in (PickledType, PickledArray, pickled_number, raw_bytes):
            raise InputError("calls what is not the constructor of an array")
        self.stack[-1] = function(*arguments)
        if function is raw_bytes:
            self.spend(len(self.stack[-1]))

    def set_state(self):
        target, state = self.stack[-2], self.stack.pop()
        if not isinstance(target, (PickledArray, PickledType)):
            raise InputError("sets the state of what is not an array")
        target.__setstate__(state)
        if isinstance(target, PickledArray):
            self.spend(math.prod(state[1]))

    def collect_marked(self):
        marked = self.pop_mark()
        self.append(marked)

    def collect(self, count):
        first = len(self.stack) - count
        self.stack[first:] = [self.stack[first:]]

    operations = """PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE INT LONG LONG1 BININT BININT1 BININT2 FLOAT BINFLOAT
        STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8
        BINBYTES SHORT_BINBYTES BINBYTES8 EMPTY_LIST LIST APPEND APPENDS EMPTY_DICT DICT SETITEM SETITEMS
        PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL"""
    dispatch = {getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]]
                for name in operations.split()}
    dispatch |= {pickle.TUPLE[0]: collect_marked, pickle.EMPTY_TUPLE[0]: lambda self: self.collect(0),
                 pickle.TUPLE1[0]: lambda self: self.collect(1), pickle.TUPLE2[0]: lambda self: self.collect(2),
                 pickle.TUPLE3[0]: lambda self: self.collect(3), pickle.REDUCE[0]: call, pickle.BUILD[0]: set_state}


def unpickle(content, where):
    """bytes of a pickle -> plain Python (see `PlainUnpickler`); InputError for anything else in it."""
    try:
        return PlainUnpickler(content).load()
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{where}: not a readable pickle of plain data, or a truncated one "
                         f"({type(error).__name__})") from None


def read_pickle(path):
    """Plain Python from a pickle file (IGLUE's training files and hard negatives); nothing in it is executed."""
    return unpickle(read_bytes(path), path)


def map_array(path):
    """A numpy file, memory-mapped."""
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of headers that no numpy of today writes
            return np.lib.format.open_memmap(path, mode="r")
    except Exception as error:  # a damaged header can raise anything
        raise InputError(f"{path}: not a readable array of numbers, or a truncated one "
                         f"({type(error).__name__})") from None


def open_array(path, shape, types):
    """A numpy file of one shape and one of some types, memory-mapped; InputError for any other."""
    array = map_array(path)
    if array.shape != shape or array.dtype not in types:
        expected = " or ".join(np.dtype(kind).name for kind in types)
        raise InputError(f"{path}: {array.dtype} {list(array.shape)}, expected {expected} {list(shape)}")
    return array


def require_space(folder, needed):
    """InputError unless `needed` bytes are free on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise InputError(f"{folder}: {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed")


def expect(record, key, kind, where):
    """record[key], checked to be of a type (or one of a tuple of types); a string also by `check_text`."""
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object with the field '{key}', found {type(record).__name__}")
    if key not in record:
        raise InputError(f"{where}: no field '{key}' (found: {', '.join(map(str, list(record)[:8])) or 'none'})")
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{where}: the field '{key}' must be {names}, found {type(value).__name__} {shorten(value)}")
    return check_text(value, f"{where}, field '{key}'") if isinstance(value, str) else value


MAX_TEXT = 5000  # characters; the longest caption of the benchmark has 373


def check_text(text, where):
    if len(text) > MAX_TEXT:
        raise InputError(f"{where}: {len(text):,} characters, more than the {MAX_TEXT:,} that any text may have")
    # half of a surrogate pair: JSON can write what no file can hold
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        raise InputError(f"{where}: {shorten(text)} has half a surrogate pair in it")
    return text


def shorten(value):
    """repr for messages: of a few characters and levels, whatever the value."""
    return reprlib.repr(value)[:80]


def identifier(value, where):
    """The id of a question or pair: a string or a number, as a string of printable characters."""
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise InputError(f"{where}: an id must be str or int, found {type(value).__name__} {shorten(value)}")
    if (isinstance(value, int) and abs(value) >= 10**18
            or isinstance(value, str) and not (value.isprintable() and 0 < len(value) <= 100)):
        raise InputError(f"{where}: {shorten(value)} is not an id (1 to 100 printable characters)")
    return str(value)


def image_key(value, where):
    """An image's id as a bare file name without '.jpg': nothing that could lead out of the image folder."""
    key = identifier(value, where).removesuffix(".jpg")
    if key in ("", ".", "..") or key != os.path.basename(key) or "\\" in key:
        raise InputError(f"{where}: {shorten(value)} is not an image id (a plain file name is expected)")
    return key


def check_fields(record, checks, where):
    """InputError unless `record` is a dict with every field of `checks`, each as it says.

    A check is (what is expected, whether a value is it), such as those that follow.
    """
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected an object, found {type(record).__name__}")
    for name, (expected, holds) in checks.items():
        if name not in record:
            raise InputError(f"{where}: no field {name!r}")
        if not holds(record[name]):
            raise InputError(f"{where}: {name} is {shorten(record[name])}, expected {expected}")


def whole(least, most=math.inf):
    expected = f"a whole number of at least {least}" + (f" and at most {most:,}" if most < math.inf else "")
    return expected, lambda value: type(value) is int and least <= value <= most  # and not bool


def number(expected, holds):
    return expected, lambda value: type(value) in (int, float) and holds(value)


def numbers(expected, lengths, each):
    return expected, lambda value: (isinstance(value, (list, tuple)) and len(value) in lengths
                                    and all(each[1](one) for one in value))


def one_of(*values):
    return f"one of {', '.join(map(repr, values))}", lambda value: isinstance(value, str) and value in values


def optional(check):
    return f"{check[0]}, or none", lambda value: value is None or check[1](value)


COUNT = whole(1, 10**6)
YES_NO = ("true or false", lambda value: type(value) is bool)


@contextlib.contextmanager
def writing(path):
    """Whatever the disk refuses while `path` is written (it is full, say) as an InputError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        refused = error if isinstance(error, OSError) else error.__context__  # torch.save raises its own on top
        if not isinstance(refused, OSError):
            raise
        raise InputError(f"{path}: cannot be written ({refused.strerror}); what was complete before is untouched") \
            from None


def write(path, save):
    """Write a file under a temporary name, force it to disk, then rename: the old stays until the new is complete."""
    part = f"{path}.part"
    try:
        with writing(path):
            with open(part, "wb") as file:
                save(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
    finally:
        with contextlib.suppress(OSError):  # it has been renamed, or was never there
            os.remove(part)
    if os.name == "posix":  # Windows opens no folders
        sync_folder(os.path.dirname(path) or ".")


def sync_folder(path):
    """Force a folder to disk, without which a power cut could undo a rename in it."""
    with contextlib.suppress(OSError):  # some network file systems cannot; the files in it are complete all the same
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_json(path, content):
    text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    write(path, lambda file: file.write(text.encode()))
