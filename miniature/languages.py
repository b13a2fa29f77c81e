"""The thirteen languages of the miniature: a small grammar for each.

A meaning is a `Form`: a kind of sentence, the noun phrases in it, and the values that are stated
or asked. `say(form, language)` writes it in one of the thirteen languages, in its own script:

    >>> circle, cross = NounPhrase("small", "red", "circle"), NounPhrase("large", None, "cross")
    >>> say(Form("exist", (circle,)), "de")
    'Es gibt einen kleinen roten Kreis.'
    >>> say(Form("choose", (cross,), "colour", ("yellow", "red"), question=True), "ko")
    '큰 십자는 노란색입니까 빨간색입니까?'

Each language has a lexicon, a table of sentences with slots, and two functions: one inflects a
noun phrase, one says a value of a thing. In the tables,

    {a} {b}      are the two noun phrases, and {a:der} is a noun phrase inflected as "der" says
    {x} {y}      are the two values
    [p|q|r|s]    stands for p in a sentence about colour, q about shape, r about size, s about side

The writer knows these grammars well enough for this vocabulary, but no native speaker has checked
them. A meaning has one wording per language, so the text is far easier than natural language.

The tokenizer does not see these scripts but Latin letters: romanisation.tsv lists every word,
letter and syllable with its reading. Languages then share pieces of words, as they do in XLM-R's
vocabulary. Without that, fine-tuning on English would damage the other languages less.
"""

import os
import re
from functools import cache
from typing import NamedTuple

COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
SIDES = ("left", "right")
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "side": SIDES}
ROMANISATION = os.path.join(os.path.dirname(os.path.abspath(__file__)), "romanisation.tsv")


class NounPhrase(NamedTuple):
    """What is said of an object. Without a shape it is called a "thing"."""

    size: str | None = None
    colour: str | None = None
    shape: str | None = None


class Form(NamedTuple):
    """A meaning, independent of the language.

    kind         phrases  attribute  values   statement; question
    "phrase"     a        -          -        small red circle (no sentence)
    "exist"      a        -          -        There is an a.         Is there an a?
    "and", "or"  a, b     -          -        There is an a and a b. Is there an a and a b?
    "attribute"  a        any        x        The a is x.            Is the a x?
    "what"       a        any        -        -                      What colour is the a?
    "choose"     a        any        x, y     -                      Is the a x or y?
    """

    kind: str
    phrases: tuple
    attribute: str | None = None
    values: tuple = ()
    question: bool = False


class Language:
    """A grammar.

    table      lines "kind sentence"; a kind with a question mark is the question
    phrase     function(noun phrase, inflection) -> words
    predicate  function(value, noun phrase that it is said of, inflection) -> words
    spaces     False: spaces in the table and the lexicon only show where words end
    """

    def __init__(self, table, phrase, predicate, statement="{}.", question="{}?", spaces=True):
        self.phrase, self.predicate, self.spaces = phrase, predicate, spaces
        self.statement, self.question = statement, question
        self.sentences = {"phrase": "{a}"}
        for line in table.strip().splitlines():
            kind, sentence = line.split(maxsplit=1)
            self.sentences[kind] = sentence


def lexicon(words):
    """Words in the order: colours, shapes, "thing", sizes, sides -> {concept: word}."""
    concepts = (*COLOURS, *SHAPES, "thing", *SIZES, *SIDES)
    separated = re.split(r",\s+", words)
    return dict(zip(concepts, separated, strict=True))


def in_order(words, phrase, order):
    """The uninflected words of a noun phrase in an order such as "size colour shape"."""
    concepts = {"size": phrase.size, "colour": phrase.colour, "shape": phrase.shape or "thing"}
    said = []
    for name in order.split():
        if concepts[name]:
            said.append(words[concepts[name]])
    return " ".join(said)


def uninflected(words, order):
    """The phrase and predicate functions of a language that inflects nothing."""

    def phrase(noun_phrase, _):
        return in_order(words, noun_phrase, order)

    def predicate(value, of, _):
        return words[value]

    return phrase, predicate


# ----------------------------------------------------------------------------------------------
# English

EN = lexicon("""red, green, blue, yellow, white, circle, square, triangle, cross, thing,
    small, large, on the left, on the right""")


def english_phrase(phrase, article):
    words = in_order(EN, phrase, "size colour shape")
    return f"{article} {words}".strip()


def english_predicate(value, of, _):
    if value in SHAPES:
        return "a " + EN[value]
    return EN[value]


ENGLISH = Language("""
    exist       there is {a:a}
    exist?      is there {a:a}
    and         there is {a:a} and {b:a}
    and?        is there {a:a} and {b:a}
    or          there is {a:a} or {b:a}
    or?         is there {a:a} or {b:a}
    attribute   {a:the} is {x}
    attribute?  is {a:the} {x}
    choose?     is {a:the} {x} or {y}
    what?       [what colour|what shape|what size|on which side] is {a:the}
    """, english_phrase, english_predicate)

# ----------------------------------------------------------------------------------------------
# German: the ending of an adjective depends on article and gender. Nouns are marked with their
# gender; this lexicon has no feminine one

DE = lexicon("""rot, grün, blau, gelb, weiß, Kreis/m, Quadrat/n, Dreieck/n, Kreuz/n, Ding/n,
    klein, groß, links, rechts""")
GERMAN_ENDINGS = {  # (inflection, gender) -> article, ending of adjectives
    ("", "m"): ("", "er"), ("", "n"): ("", "es"),
    ("der", "m"): ("der", "e"), ("der", "n"): ("das", "e"),
    ("ein", "m"): ("ein", "er"), ("ein", "n"): ("ein", "es"),
    ("einen", "m"): ("einen", "en"), ("einen", "n"): ("ein", "es"),
}


def german_phrase(phrase, inflection):
    noun, gender = DE[phrase.shape or "thing"].split("/")
    article, ending = GERMAN_ENDINGS[inflection, gender]
    words = [article]
    for adjective in (phrase.size, phrase.colour):
        if adjective:
            words.append(DE[adjective] + ending)
    return " ".join([*words, noun]).strip()


def german_predicate(value, of, _):
    if value in SHAPES:
        return german_phrase(NounPhrase(shape=value), "ein")
    return DE[value]


GERMAN = Language("""
    exist       es gibt {a:einen}
    exist?      gibt es {a:einen}
    and         es gibt {a:einen} und {b:einen}
    and?        gibt es {a:einen} und {b:einen}
    or          es gibt {a:einen} oder {b:einen}
    or?         gibt es {a:einen} oder {b:einen}
    attribute   {a:der} ist {x}
    attribute?  ist {a:der} {x}
    choose?     ist {a:der} {x} oder {y}
    what?       [welche Farbe hat|welche Form hat|welche Größe hat|auf welcher Seite ist] {a:der}
    """, german_phrase, german_predicate)

# ----------------------------------------------------------------------------------------------
# Portuguese, Spanish, French: two genders; adjectives agree with the noun ("rojo/roja")


def romance_grammar(words, order, articles):
    """The phrase and predicate functions of a language.

    articles: inflection -> the article of masculine and of feminine nouns and, in French, the
    elided one. The first inflection is the indefinite article.
    """
    indefinite = next(iter(articles))

    def agree(adjective, gender):
        masculine, _, feminine = words[adjective].partition("/")
        if gender == "f" and feminine:
            return feminine
        return masculine

    def phrase(noun_phrase, inflection):
        noun, gender = words[noun_phrase.shape or "thing"].split("/")
        said = []
        for name in order.split():
            value = getattr(noun_phrase, name)
            if name == "shape":
                said.append(noun)
            elif value:
                said.append(agree(value, gender))
        text = " ".join(said)
        if not inflection:
            return text
        masculine, feminine, *elided = articles[inflection]
        if elided and text[0] in "aeiou":
            return elided[0] + text
        if gender == "f":
            return f"{feminine} {text}"
        return f"{masculine} {text}"

    def predicate(value, of, _):
        if value in SHAPES:
            return phrase(NounPhrase(shape=value), indefinite)
        _, gender = words[of.shape or "thing"].split("/")
        return agree(value, gender)

    return phrase, predicate


PT = lexicon("""vermelho/vermelha, verde, azul, amarelo/amarela, branco/branca,
    círculo/m, quadrado/m, triângulo/m, cruz/f, coisa/f,
    pequeno/pequena, grande, à esquerda, à direita""")
PORTUGUESE = Language("""
    exist       há {a:um}
    exist?      há {a:um}
    and         há {a:um} e {b:um}
    and?        há {a:um} e {b:um}
    or          há {a:um} ou {b:um}
    or?         há {a:um} ou {b:um}
    attribute   {a:o} [é|é|é|está] {x}
    attribute?  {a:o} [é|é|é|está] {x}
    choose?     {a:o} [é|é|é|está] {x} ou {y}
    what?       [qual é a cor|qual é a forma|qual é o tamanho|de que lado está] {a:[do|do|do|o]}
    """, *romance_grammar(PT, "shape colour size",
                          {"um": ("um", "uma"), "o": ("o", "a"), "do": ("do", "da")}))

ES = lexicon("""rojo/roja, verde, azul, amarillo/amarilla, blanco/blanca,
    círculo/m, cuadrado/m, triángulo/m, cruz/f, objeto/m,
    pequeño/pequeña, grande, a la izquierda, a la derecha""")
SPANISH = Language("""
    exist       hay {a:un}
    exist?      hay {a:un}
    and         hay {a:un} y {b:un}
    and?        hay {a:un} y {b:un}
    or          hay {a:un} o {b:un}
    or?         hay {a:un} o {b:un}
    attribute   {a:el} [es|es|es|está] {x}
    attribute?  {a:el} [es|es|es|está] {x}
    choose?     {a:el} [es|es|es|está] {x} o {y}
    what?       [de qué color es|qué forma tiene|de qué tamaño es|en qué lado está] {a:el}
    """, *romance_grammar(ES, "shape colour size", {"un": ("un", "una"), "el": ("el", "la")}),
    question="¿{}?")

FR = lexicon("""rouge, vert/verte, bleu/bleue, jaune, blanc/blanche,
    cercle/m, carré/m, triangle/m, croix/f, objet/m,
    petit/petite, grand/grande, à gauche, à droite""")
FRENCH = Language("""
    exist       il y a {a:un}
    exist?      est-ce qu'il y a {a:un}
    and         il y a {a:un} et {b:un}
    and?        est-ce qu'il y a {a:un} et {b:un}
    or          il y a {a:un} ou {b:un}
    or?         est-ce qu'il y a {a:un} ou {b:un}
    attribute   {a:le} est {x}
    attribute?  est-ce que {a:le} est {x}
    choose?     est-ce que {a:le} est {x} ou {y}
    what?       de [quelle couleur|quelle forme|quelle taille|quel côté] est {a:le}
    """, *romance_grammar(FR, "size shape colour",
                          {"un": ("un", "une"), "le": ("le", "la", "l'")}), question="{} ?")

# ----------------------------------------------------------------------------------------------
# Russian: every noun here is masculine and stands in the nominative, so nothing changes its ending

RU = lexicon("""красный, зелёный, синий, жёлтый, белый,
    круг, квадрат, треугольник, крест, предмет, маленький, большой, слева, справа""")
RUSSIAN = Language("""
    exist       есть {a}
    exist?      есть ли {a}
    and         есть {a} и {b}
    and?        есть ли {a} и {b}
    or          есть {a} или {b}
    or?         есть ли {a} или {b}
    attribute   {a} [{x}|— это {x}|{x}|{x}]
    attribute?  {a} [{x}|— это {x}|{x}|{x}]
    choose?     {a} [{x}|— это {x}|{x}|{x}] или {y}
    what?       [какого цвета|какой формы|какого размера|с какой стороны] {a}
    """, *uninflected(RU, "size colour shape"))

# ----------------------------------------------------------------------------------------------
# Indonesian: nothing is inflected; "sebuah" is a, "itu" is the

ID = lexicon("""merah, hijau, biru, kuning, putih, lingkaran, persegi, segitiga, silang, benda,
    kecil, besar, di kiri, di kanan""")


def indonesian_phrase(phrase, _):
    return in_order(ID, phrase, "shape colour size")


def indonesian_predicate(value, of, _):
    if value in SHAPES:
        return "sebuah " + ID[value]
    return ID[value]


INDONESIAN = Language("""
    exist       ada sebuah {a}
    exist?      apakah ada sebuah {a}
    and         ada sebuah {a} dan sebuah {b}
    and?        apakah ada sebuah {a} dan sebuah {b}
    or          ada sebuah {a} atau sebuah {b}
    or?         apakah ada sebuah {a} atau sebuah {b}
    attribute   {a} itu {x}
    attribute?  apakah {a} itu {x}
    choose?     apakah {a} itu {x} atau {y}
    what?       [apa warna|apa bentuk|apa ukuran|di sisi mana] {a} itu
    """, indonesian_phrase, indonesian_predicate)

# ----------------------------------------------------------------------------------------------
# Chinese: 的 follows a colour, a size stands directly before the noun

ZH = lexicon("""红色, 绿色, 蓝色, 黄色, 白色, 圆形, 方形, 三角形, 十字形, 物体, 小, 大, 左边, 右边""")


def chinese_phrase(phrase, _):
    words = in_order(ZH, phrase, "size shape")
    if phrase.colour:
        return f"{ZH[phrase.colour]} 的 {words}"
    return words


def chinese_predicate(value, of, _):
    return ZH[value]


CHINESE = Language("""
    exist       有 一个 {a}
    exist?      有 一个 {a} 吗
    and         有 一个 {a} 和 一个 {b}
    and?        有 一个 {a} 和 一个 {b} 吗
    or          有 一个 {a} 或 一个 {b}
    or?         有 一个 {a} 或 一个 {b} 吗
    attribute   {a} [是 {x} 的|是 {x}|是 {x} 的|在 {x}]
    attribute?  {a} [是 {x} 的|是 {x}|是 {x} 的|在 {x}] 吗
    choose?     {a} [是 {x} 的 还是 {y} 的|是 {x} 还是 {y}|是 {x} 的 还是 {y} 的|在 {x} 还是 在 {y}]
    what?       {a} [是 什么 颜色|是 什么 形状|是 什么 大小|在 哪 一 边]
    """, chinese_phrase, chinese_predicate, "{}。", "{}？", spaces=False)

# ----------------------------------------------------------------------------------------------
# Japanese: most colours are adjectives in い; "green" is a noun, which needs の before another one

JA = lexicon("""赤い, 緑 の, 青い, 黄色い, 白い, 丸, 四角, 三角, 十字, 物, 小さい, 大きい, 左, 右""")


def japanese_phrase(phrase, _):
    return in_order(JA, phrase, "size colour shape")


def japanese_predicate(value, of, _):
    return JA[value].removesuffix(" の")


JAPANESE = Language("""
    exist       {a} が あります
    exist?      {a} が あります か
    and         {a} と {b} が あります
    and?        {a} と {b} が あります か
    or          {a} か {b} が あります
    or?         {a} か {b} が あります か
    attribute   {a} は {x} [です|です|です|に あります]
    attribute?  {a} は {x} [です|です|です|に あります] か
    choose?     {a} は {x} [です|です|です|に あります] か 、 {y} [です|です|です|に あります] か
    what?       {a} は [何色 です|どんな 形 です|どんな 大きさ です|どちら側 に あります] か
    """, japanese_phrase, japanese_predicate, "{}。", "{}？", spaces=False)

# ----------------------------------------------------------------------------------------------
# Korean: a particle depends on whether the word before it ends in a consonant; the verb comes
# last and ends in -니다 in statements, in -니까 in questions

KO = lexicon("""빨간, 초록, 파란, 노란, 하얀, 원, 사각형, 삼각형, 십자, 물체, 작은, 큰, 왼쪽, 오른쪽""")
KOREAN_PARTICLES = {  # after a consonant, after a vowel
    "": ("", ""), "은": ("은", "는"), "이": ("이", "가"), "과": ("과", "와"), "이나": ("이나", "나"),
}


def korean_phrase(phrase, particle):
    words = in_order(KO, phrase, "size colour shape")
    # Unicode orders syllables by their sounds: every 28th has no final consonant
    ends_in_vowel = (ord(words[-1]) - ord("가")) % 28 == 0
    return words + KOREAN_PARTICLES[particle][ends_in_vowel]


def korean_predicate(value, of, _):
    if value in SIZES:
        return {"small": "작습니", "large": "큽니"}[value]
    if value in COLOURS:
        return KO[value] + "색"
    return KO[value]


KOREAN = Language("""
    exist       {a:이} 있습니다
    exist?      {a:이} 있습니까
    and         {a:과} {b:이} 있습니다
    and?        {a:과} {b:이} 있습니까
    or          {a:이나} {b:이} 있습니다
    or?         {a:이나} {b:이} 있습니까
    attribute   {a:은} {x}[입니다|입니다|다|에 있습니다]
    attribute?  {a:은} {x}[입니까|입니까|까|에 있습니까]
    choose?     {a:은} {x}[입니까|입니까|까|에 있습니까] {y}[입니까|입니까|까|에 있습니까]
    what?       {a:은} [무슨 색입니까|무슨 모양입니까|무슨 크기입니까|어느 쪽에 있습니까]
    """, korean_phrase, korean_predicate)

# ----------------------------------------------------------------------------------------------
# Bengali: একটি is a, -টি the, -টির of the

BN = lexicon("""লাল, সবুজ, নীল, হলুদ, সাদা, বৃত্ত, বর্গ, ত্রিভুজ, ক্রস, বস্তু, ছোট, বড়,
    বাম দিকে, ডান দিকে""")
BENGALI = Language("""
    exist       একটি {a} আছে
    exist?      একটি {a} আছে কি
    and         একটি {a} এবং একটি {b} আছে
    and?        একটি {a} এবং একটি {b} আছে কি
    or          একটি {a} অথবা একটি {b} আছে
    or?         একটি {a} অথবা একটি {b} আছে কি
    attribute   {a}টি {x}
    attribute?  {a}টি কি {x}
    choose?     {a}টি {x} না {y}
    what?       [{a}টির রং কী|{a}টির আকৃতি কী|{a}টির আকার কী|{a}টি কোন দিকে]
    """, *uninflected(BN, "size colour shape"), "{}।")

# ----------------------------------------------------------------------------------------------
# Arabic: adjectives follow the noun, agree in gender (a noun in ة is feminine), and take the
# article as the noun does

AR = lexicon("""أحمر/حمراء, أخضر/خضراء, أزرق/زرقاء, أصفر/صفراء, أبيض/بيضاء,
    دائرة, مربع, مثلث, صليب, شيء, صغير/صغيرة, كبير/كبيرة, على اليسار, على اليمين""")


def arabic_adjective(adjective, noun):
    masculine, feminine = AR[adjective].split("/")
    if noun.endswith("ة"):
        return feminine
    return masculine


def arabic_phrase(phrase, article):
    noun = AR[phrase.shape or "thing"]
    words = [article + noun]
    for adjective in (phrase.colour, phrase.size):
        if adjective:
            words.append(article + arabic_adjective(adjective, noun))
    return " ".join(words)


def arabic_predicate(value, of, _):
    if value in COLOURS or value in SIZES:
        return arabic_adjective(value, AR[of.shape or "thing"])
    return AR[value]


ARABIC = Language("""
    exist       هناك {a}
    exist?      هل هناك {a}
    and         هناك {a} و{b}
    and?        هل هناك {a} و{b}
    or          هناك {a} أو {b}
    or?         هل هناك {a} أو {b}
    attribute   {a:ال} {x}
    attribute?  هل {a:ال} {x}
    choose?     هل {a:ال} {x} أم {y}
    what?       [ما لون|ما شكل|ما حجم|في أي جهة] {a:ال}
    """, arabic_phrase, arabic_predicate, question="{}؟")

# ----------------------------------------------------------------------------------------------
# Turkish: "bir" (a) stands directly before the noun, the owner of a colour is in the genitive, and
# the vowel of the question particle mı, mi, mu, mü follows the last vowel of the word before it

TR = lexicon("""kırmızı, yeşil, mavi, sarı, beyaz,
    daire/dairenin, kare/karenin, üçgen/üçgenin, haç/haçın, nesne/nesnenin,
    küçük, büyük, solda, sağda""")
HARMONY = dict(zip("aıeiouöü", "ııiiuuüü"))


def turkish_phrase(phrase, inflection):
    words = []
    for adjective in (phrase.size, phrase.colour):
        if adjective:
            words.append(TR[adjective])
    noun, genitive = TR[phrase.shape or "thing"].split("/")
    if inflection == "bir":
        words.append("bir")
    if inflection == "gen":
        noun = genitive
    return " ".join([*words, noun])


def turkish_predicate(value, of, inflection):
    words = TR[value]
    if value in SHAPES:
        words = turkish_phrase(NounPhrase(shape=value), "bir")
    if inflection == "mi":
        last_vowel = re.findall("[aıeiouöü]", words)[-1]
        words += " m" + HARMONY[last_vowel]
    return words


TURKISH = Language("""
    exist       {a:bir} var
    exist?      {a:bir} var mı
    and         {a:bir} ve {b:bir} var
    and?        {a:bir} ve {b:bir} var mı
    or          {a:bir} veya {b:bir} var
    or?         {a:bir} veya {b:bir} var mı
    attribute   {a} {x}
    attribute?  {a} {x:mi}
    choose?     {a} {x:mi} {y:mi}
    what?       [{a:gen} rengi nedir|{a:gen} şekli nedir|{a:gen} boyutu nedir|{a} hangi tarafta]
    """, turkish_phrase, turkish_predicate)

LANGUAGES = {
    "en": ENGLISH, "de": GERMAN, "pt": PORTUGUESE, "ru": RUSSIAN, "id": INDONESIAN, "zh": CHINESE,
    "ko": KOREAN, "bn": BENGALI, "ar": ARABIC, "es": SPANISH, "fr": FRENCH, "ja": JAPANESE,
    "tr": TURKISH,
}

# ----------------------------------------------------------------------------------------------
# Saying a form


@cache
def template(language, kind, question, attribute):
    """The sentence of a language's table, reduced to what stands there for the attribute."""
    if question:
        kind += "?"
    sentence = LANGUAGES[language].sentences[kind]
    for brackets in re.findall(r"\[.*?\]", sentence):
        options = brackets[1:-1].split("|")
        about = list(ATTRIBUTES).index(attribute)
        sentence = sentence.replace(brackets, options[about])
    return sentence


def say(form, language):
    """The form as the language writes it: script, spaces, capital letter, punctuation.

    Raises KeyError for a language or a kind of sentence that does not exist.
    """
    grammar = LANGUAGES[language]

    def fill(slot):
        name, inflection = slot.groups()
        if name in "ab":
            return grammar.phrase(form.phrases["ab".index(name)], inflection)
        return grammar.predicate(form.values["xy".index(name)], form.phrases[0], inflection)

    sentence = template(language, form.kind, form.question, form.attribute)
    text = re.sub(r"\{(\w):?(\w*)\}", fill, sentence)
    if not grammar.spaces:
        text = text.replace(" ", "")
    if form.kind == "phrase":
        return text
    text = text[0].upper() + text[1:]
    if form.question:
        return grammar.question.format(text)
    return grammar.statement.format(text)


def normalization_rules():
    """romanisation.tsv as SentencePiece's `normalization_rule_tsv`, in hexadecimal code points.

    SentencePiece replaces the longest source that matches. Chinese, Japanese and Bengali have a
    rule for every word and, for other words, one for every character: 大 is da, 大きい is ookii.
    The file also knows words that the miniature no longer uses; the shipped tokenizer and
    checkpoints were made with it, so it must not change. ▁ in it is a space.
    """
    rules = []
    with open(ROMANISATION, encoding="utf-8") as file:
        for line in file.read().splitlines():
            source, reading = line.split("\t")
            rules.append(f"{code_points(source)}\t{code_points(reading.replace('▁', ' '))}\n")
    return "".join(rules)


def code_points(text):
    return " ".join(f"{ord(letter):X}" for letter in text)
