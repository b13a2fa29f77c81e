"""The thirteen languages of the embedded miniature: one small grammar each, and one romanisation for all.

A meaning is a `Form`: a kind of sentence ("exist", "attribute", "what", ...), the noun phrases in it, and what is said
or asked about them. `say(form, language)` puts it into English, German, Portuguese, Russian, Indonesian, Chinese,
Korean, Bengali (the languages of xGQA), Arabic, Spanish, French, Japanese or Turkish (XVNLI and xFlickrCO), in the
language's own script, with its capitals and punctuation:

    >>> circle, cross = NounPhrase("small", "red", "circle"), NounPhrase("large", None, "cross")
    >>> say(Form("exist", (circle,)), "de")
    'Es gibt einen kleinen roten Kreis.'
    >>> say(Form("choose", (cross,), "colour", ("yellow", "red"), question=True), "ko")
    '큰 십자는 노란색입니까 빨간색입니까?'

A language is a lexicon, a table of sentences with slots, and functions that inflect what goes into a slot:

    {a} {b}      the noun phrases, {x} {y} the values; after a colon the inflection: {a:einen}, {a:gen}, {a:은}
    [p|q|r|s]    p if the sentence is about a colour, q about a shape, r about a size, s about a side

Agreement, case, particles, vowel harmony and word order are right within this vocabulary to the best of the writer's
knowledge; no native speaker has checked them. There is one wording per meaning: far easier than natural language.

`normalization_rules()` is a SentencePiece normalisation table that lower-cases and romanises all of this, so that a
tokenizer reads the real scripts with 200 to 300 pieces. Languages then share pieces, as they share words in XLM-R's
vocabulary of 250,000; with more pieces, so less sharing, fine-tuning on English damages the other languages less.
"""

import itertools
import re
import unicodedata
from functools import partial
from typing import Callable, NamedTuple

COLOURS = ("red", "green", "blue", "yellow", "white", "orange", "purple", "pink", "brown", "black", "grey")
SHAPES = ("circle", "square", "triangle", "cross", "star", "diamond", "ring", "heart", "arrow")
SIZES = ("small", "large")
SIDES = ("left", "right")
ATTRIBUTES = {"colour": COLOURS, "shape": SHAPES, "size": SIZES, "side": SIDES}


class NounPhrase(NamedTuple):
    """An object as far as it is described; without a shape it is called a "thing"."""
    size: str | None = None
    colour: str | None = None
    shape: str | None = None


class Form(NamedTuple):
    """A meaning, independent of the language.

    kind         phrases  attribute     values   statement; question
    "phrase"     a        -             -        small red circle (no sentence)
    "exist"      a        -             -        There is an a.         Is there an a?
    "and", "or"  a, b     -             -        There is an a and a b. Is there an a and a b?
    "attribute"  a        any           x        The a is x.            Is the a x?
    "what"       a        any           -        -                      What colour is the a?
    "choose"     a        any           x, y     -                      Is the a x or y?
    "same"       a, b     except side   -        The a and the b have the same colour.     Do the a and the b have ...?
    "different"  a, b     except side   -        The a and the b have a different colour.  Do the a and the b have ...?
    """
    kind: str
    phrases: tuple[NounPhrase, ...]
    attribute: str | None = None
    values: tuple[str, ...] = ()
    question: bool = False


class Language(NamedTuple):
    sentences: dict[tuple[str, str | None], str]        # ("attribute?", "colour") -> "ist {a:der} {x}"
    phrase: Callable[[NounPhrase, str], str]            # noun phrase, inflection -> words
    predicate: Callable[[str, NounPhrase, str], str]    # value, noun phrase it is said of, inflection -> words
    statement: str = "{}."
    question: str = "{}?"
    spaces: bool = True                                 # False: the spaces between words are not written


def lexicon(colours: str, shapes: str, thing: str, sizes: str, sides: str) -> dict[str, str]:
    """Concept -> word, from comma-separated words in the order of `ATTRIBUTES`."""
    concepts = (*COLOURS, *SHAPES, "thing", *SIZES, *SIDES)
    return dict(zip(concepts, ", ".join((colours, shapes, thing, sizes, sides)).split(", "), strict=True))


def sentences(table: dict[str, str], ask: Callable[[str], str] | None = None) -> dict[tuple[str, str | None], str]:
    """Expands [p|q|r|s] into a sentence per attribute; adds `ask(statement)` for each question not written out."""
    for kind in ("exist", "and", "or", "attribute", "same", "different"):
        if kind + "?" not in table:
            table[kind + "?"] = ask(table[kind])
    expanded = {("phrase", None): "{a}"}
    for kind, text in table.items():
        options = [option.split("|") for option in re.findall(r"\[(.*?)\]", text)]
        for index, attribute in enumerate((*ATTRIBUTES, None)):
            if all(index < len(option) for option in options):
                expanded[kind, attribute] = re.sub(r"\[(.*?)\]", lambda match: match[1].split("|")[index], text)
    return expanded


def in_order(words: dict[str, str], phrase: NounPhrase, order: str) -> str:
    """The words of a noun phrase in an order such as "size colour shape", uninflected."""
    concepts = {"size": phrase.size, "colour": phrase.colour, "shape": phrase.shape or "thing"}
    return " ".join([words[concepts[name]] for name in order.split() if concepts[name]])


# ---- English ---------------------------------------------------------------------------------------------------------

EN = lexicon(
    colours="red, green, blue, yellow, white, orange, purple, pink, brown, black, grey",
    shapes="circle, square, triangle, cross, star, diamond, ring, heart, arrow", thing="thing",
    sizes="small, large", sides="on the left, on the right")


def english_phrase(phrase, article):
    words = in_order(EN, phrase, "size colour shape")
    if article == "a" and words[0] in "aeiou":
        article = "an"
    return f"{article} {words}".strip()


def english_predicate(value, of, _):
    return english_phrase(NounPhrase(shape=value), "a") if value in SHAPES else EN[value]


english = Language(sentences({
    "exist": "there is {a:a}", "exist?": "is there {a:a}",
    "and": "there is {a:a} and {b:a}", "and?": "is there {a:a} and {b:a}",
    "or": "there is {a:a} or {b:a}", "or?": "is there {a:a} or {b:a}",
    "attribute": "{a:the} is {x}", "attribute?": "is {a:the} {x}",
    "choose?": "is {a:the} {x} or {y}",
    "what?": "[what colour|what shape|what size|on which side] is {a:the}",
    "same": "{a:the} and {b:the} have the same [colour|shape|size]",
    "same?": "do {a:the} and {b:the} have the same [colour|shape|size]",
    "different": "{a:the} and {b:the} have a different [colour|shape|size]",
    "different?": "do {a:the} and {b:the} have a different [colour|shape|size]"}), english_phrase, english_predicate)

# ---- German: three genders, adjective endings depend on the article, nouns are capitalised ---------------------------

DE = lexicon(
    colours="rot, grün, blau, gelb, weiß, orange, lila, rosa, braun, schwarz, grau",
    shapes="Kreis/m, Quadrat/n, Dreieck/n, Kreuz/n, Stern/m, Raute/f, Ring/m, Herz/n, Pfeil/m", thing="Ding/n",
    sizes="klein, groß", sides="links, rechts")
GERMAN_ENDINGS = {  # inflection -> gender -> article and adjective ending
    "": {"m": ("", "er"), "f": ("", "e"), "n": ("", "es")},
    "der": {"m": ("der", "e"), "f": ("die", "e"), "n": ("das", "e")},
    "ein": {"m": ("ein", "er"), "f": ("eine", "e"), "n": ("ein", "es")},
    "einen": {"m": ("einen", "en"), "f": ("eine", "e"), "n": ("ein", "es")}}


def german_phrase(phrase, inflection):
    noun, gender = DE[phrase.shape or "thing"].split("/")
    article, ending = GERMAN_ENDINGS[inflection][gender]
    adjectives = [DE[phrase.size] + ending] if phrase.size else []
    if phrase.colour:
        adjectives.append(DE[phrase.colour] + (ending if phrase.colour not in ("orange", "purple", "pink") else ""))
    return " ".join([article, *adjectives, noun]).strip()


def german_predicate(value, of, _):
    return german_phrase(NounPhrase(shape=value), "ein") if value in SHAPES else DE[value]


german = Language(sentences({
    "exist": "es gibt {a:einen}", "exist?": "gibt es {a:einen}",
    "and": "es gibt {a:einen} und {b:einen}", "and?": "gibt es {a:einen} und {b:einen}",
    "or": "es gibt {a:einen} oder {b:einen}", "or?": "gibt es {a:einen} oder {b:einen}",
    "attribute": "{a:der} ist {x}", "attribute?": "ist {a:der} {x}",
    "choose?": "ist {a:der} {x} oder {y}",
    "what?": "[welche Farbe hat|welche Form hat|welche Größe hat|auf welcher Seite ist] {a:der}",
    "same": "{a:der} und {b:der} haben die gleiche [Farbe|Form|Größe]",
    "same?": "haben {a:der} und {b:der} die gleiche [Farbe|Form|Größe]",
    "different": "{a:der} und {b:der} haben eine andere [Farbe|Form|Größe]",
    "different?": "haben {a:der} und {b:der} eine andere [Farbe|Form|Größe]"}), german_phrase, german_predicate)

# ---- Portuguese, Spanish, French: two genders, adjectives agree ------------------------------------------------------


def romance_grammar(words, order, indefinite, articles):
    """The phrase and predicate functions for nouns marked "círculo/m" and adjectives "vermelho/vermelha".

    articles: inflection -> masculine, feminine and, in French, elided article; `indefinite` is that of "is a circle".
    """
    def agree(adjective, gender):
        return words[adjective].split("/")[-1 if gender == "f" else 0]

    def phrase(noun_phrase, inflection):
        noun, gender = words[noun_phrase.shape or "thing"].split("/")
        parts = {"shape": noun, "size": noun_phrase.size and agree(noun_phrase.size, gender),
                 "colour": noun_phrase.colour and agree(noun_phrase.colour, gender)}
        text = " ".join([parts[name] for name in order.split() if parts[name]])
        if not inflection:
            return text
        masculine, feminine, *elided = articles[inflection]
        if elided and text[0] in "aeioué":
            return elided[0] + text
        return f"{feminine if gender == 'f' else masculine} {text}"

    def predicate(value, of, _):
        if value in SHAPES:
            return phrase(NounPhrase(shape=value), indefinite)
        return words[value] if value in SIDES else agree(value, words[of.shape or "thing"].split("/")[1])

    return phrase, predicate


PT = lexicon(
    colours="vermelho/vermelha, verde, azul, amarelo/amarela, branco/branca, laranja, roxo/roxa, rosa, marrom, "
            "preto/preta, cinza",
    shapes="círculo/m, quadrado/m, triângulo/m, cruz/f, estrela/f, losango/m, anel/m, coração/m, seta/f",
    thing="coisa/f", sizes="pequeno/pequena, grande", sides="à esquerda, à direita")
portuguese = Language(sentences({
    "exist": "há {a:um}", "and": "há {a:um} e {b:um}", "or": "há {a:um} ou {b:um}",
    "attribute": "{a:o} [é|é|é|está] {x}",
    "choose?": "{a:o} [é|é|é|está] {x} ou {y}",
    "what?": "[qual é a cor {a:do}|qual é a forma {a:do}|qual é o tamanho {a:do}|de que lado está {a:o}]",
    "same": "{a:o} e {b:o} têm [a mesma cor|a mesma forma|o mesmo tamanho]",
    "different": "{a:o} e {b:o} têm [cores diferentes|formas diferentes|tamanhos diferentes]"}, ask=str),
    *romance_grammar(PT, "shape colour size", "um", {"um": ("um", "uma"), "o": ("o", "a"), "do": ("do", "da")}))

ES = lexicon(
    colours="rojo/roja, verde, azul, amarillo/amarilla, blanco/blanca, naranja, morado/morada, rosa, marrón, "
            "negro/negra, gris",
    shapes="círculo/m, cuadrado/m, triángulo/m, cruz/f, estrella/f, rombo/m, anillo/m, corazón/m, flecha/f",
    thing="objeto/m", sizes="pequeño/pequeña, grande", sides="a la izquierda, a la derecha")
spanish = Language(sentences({
    "exist": "hay {a:un}", "and": "hay {a:un} y {b:un}", "or": "hay {a:un} o {b:un}",
    "attribute": "{a:el} [es|es|es|está] {x}",
    "choose?": "{a:el} [es|es|es|está] {x} o {y}",
    "what?": "[de qué color es|qué forma tiene|de qué tamaño es|en qué lado está] {a:el}",
    "same": "{a:el} y {b:el} tienen [el mismo color|la misma forma|el mismo tamaño]",
    "different": "{a:el} y {b:el} tienen [colores diferentes|formas diferentes|tamaños diferentes]"}, ask=str),
    *romance_grammar(ES, "shape colour size", "un", {"un": ("un", "una"), "el": ("el", "la")}), question="¿{}?")

FR = lexicon(
    colours="rouge, vert/verte, bleu/bleue, jaune, blanc/blanche, orange, violet/violette, rose, marron, "
            "noir/noire, gris/grise",
    shapes="cercle/m, carré/m, triangle/m, croix/f, étoile/f, losange/m, anneau/m, cœur/m, flèche/f",
    thing="objet/m", sizes="petit/petite, grand/grande", sides="à gauche, à droite")
french = Language(sentences({
    "exist": "il y a {a:un}", "exist?": "est-ce qu'il y a {a:un}",
    "and": "il y a {a:un} et {b:un}", "and?": "est-ce qu'il y a {a:un} et {b:un}",
    "or": "il y a {a:un} ou {b:un}", "or?": "est-ce qu'il y a {a:un} ou {b:un}",
    "attribute": "{a:le} est {x}",
    "choose?": "est-ce que {a:le} est {x} ou {y}",
    "what?": "de [quelle couleur|quelle forme|quelle taille|quel côté] est {a:le}",
    "same": "{a:le} et {b:le} ont la même [couleur|forme|taille]",
    "different": "{a:le} et {b:le} ont des [couleurs|formes|tailles] différentes"},
    ask=lambda statement: "est-ce que " + statement),
    *romance_grammar(FR, "size shape colour", "un", {"un": ("un", "une"), "le": ("le", "la", "l'")}), question="{} ?")

# ---- Russian: gender from the noun's ending, nominative and genitive, no copula --------------------------------------

RU = lexicon(
    colours="красный, зелёный, синий, жёлтый, белый, оранжевый, фиолетовый, розовый, коричневый, чёрный, серый",
    shapes="круг/круга, квадрат/квадрата, треугольник/треугольника, крест/креста, звезда/звезды, ромб/ромба, "
           "кольцо/кольца, сердце/сердца, стрелка/стрелки",
    thing="предмет/предмета", sizes="маленький, большой", sides="слева, справа")
RUSSIAN_ENDINGS = {  # masculine -> feminine, neuter; genitive masculine and neuter, genitive feminine
    "ый": ("ая", "ое", "ого", "ой"), "ой": ("ая", "ое", "ого", "ой"),
    "кий": ("кая", "кое", "кого", "кой"), "ний": ("няя", "нее", "него", "ней")}


def russian_adjective(adjective, noun, case):
    masculine = next(ending for ending in RUSSIAN_ENDINGS if RU[adjective].endswith(ending))
    feminine, neuter, genitive, genitive_feminine = RUSSIAN_ENDINGS[masculine]
    if noun.endswith("а"):
        ending = genitive_feminine if case == "gen" else feminine
    else:
        ending = genitive if case == "gen" else neuter if noun.endswith(("о", "е")) else masculine
    return RU[adjective].removesuffix(masculine) + ending


def russian_phrase(phrase, case):
    noun, genitive = RU[phrase.shape or "thing"].split("/")
    adjectives = [russian_adjective(adjective, noun, case) for adjective in (phrase.size, phrase.colour) if adjective]
    return " ".join([*adjectives, genitive if case == "gen" else noun])


def russian_predicate(value, of, _):
    if value in SHAPES:
        return russian_phrase(NounPhrase(shape=value), "")
    return RU[value] if value in SIDES else russian_adjective(value, RU[of.shape or "thing"].split("/")[0], "")


russian = Language(sentences({
    "exist": "есть {a}", "exist?": "есть ли {a}",
    "and": "есть {a} и {b}", "and?": "есть ли {a} и {b}",
    "or": "есть {a} или {b}", "or?": "есть ли {a} или {b}",
    "attribute": "{a} [{x}|— это {x}|{x}|{x}]",
    "choose?": "{a} [{x}|— это {x}|{x}|{x}] или {y}",
    "what?": "[какого цвета|какой формы|какого размера|с какой стороны] {a}",
    "same": "у {a:gen} и {b:gen} [одинаковый цвет|одинаковая форма|одинаковый размер]",
    "different": "у {a:gen} и {b:gen} [разный цвет|разная форма|разный размер]"}, ask=str),
    russian_phrase, russian_predicate)

# ---- Indonesian: nothing is inflected; "sebuah" is a, "itu" is the ---------------------------------------------------

ID = lexicon(
    colours="merah, hijau, biru, kuning, putih, oranye, ungu, merah muda, cokelat, hitam, abu-abu",
    shapes="lingkaran, persegi, segitiga, silang, bintang, belah ketupat, cincin, hati, panah", thing="benda",
    sizes="kecil, besar", sides="di kiri, di kanan")


def indonesian_predicate(value, of, _):
    return f"sebuah {ID[value]}" if value in SHAPES else ID[value]


indonesian = Language(sentences({
    "exist": "ada sebuah {a}", "and": "ada sebuah {a} dan sebuah {b}", "or": "ada sebuah {a} atau sebuah {b}",
    "attribute": "{a} itu {x}",
    "choose?": "apakah {a} itu {x} atau {y}",
    "what?": "[apa warna|apa bentuk|apa ukuran|di sisi mana] {a} itu",
    "same": "{a} itu dan {b} itu memiliki [warna|bentuk|ukuran] yang sama",
    "different": "{a} itu dan {b} itu memiliki [warna|bentuk|ukuran] yang berbeda"},
    ask=lambda statement: "apakah " + statement),
    lambda phrase, _: in_order(ID, phrase, "shape colour size"), indonesian_predicate)

# ---- Chinese: 的 after a colour, a size directly before the noun; spaces here only mark the words --------------------

ZH = lexicon(
    colours="红色, 绿色, 蓝色, 黄色, 白色, 橙色, 紫色, 粉色, 棕色, 黑色, 灰色",
    shapes="圆形, 方形, 三角形, 十字形, 星形, 菱形, 圆环, 心形, 箭头", thing="物体", sizes="小, 大", sides="左边, 右边")


def chinese_phrase(phrase, _):
    return (f"{ZH[phrase.colour]} 的 " if phrase.colour else "") + in_order(ZH, phrase, "size shape")


chinese = Language(sentences({
    "exist": "有 一个 {a}", "and": "有 一个 {a} 和 一个 {b}", "or": "有 一个 {a} 或 一个 {b}",
    "attribute": "{a} [是 {x} 的|是 {x}|是 {x} 的|在 {x}]",
    "choose?": "{a} [是 {x} 的 还是 {y} 的|是 {x} 还是 {y}|是 {x} 的 还是 {y} 的|在 {x} 还是 在 {y}]",
    "what?": "{a} [是 什么 颜色|是 什么 形状|是 什么 大小|在 哪 一 边]",
    "same": "{a} 和 {b} 的 [颜色|形状|大小] 相同",
    "different": "{a} 和 {b} 的 [颜色|形状|大小] 不同"}, ask=lambda statement: statement + " 吗"),
    chinese_phrase, lambda value, of, _: ZH[value], "{}。", "{}？", spaces=False)

# ---- Japanese: adjectives in い and nouns with の; spaces here only mark the words -----------------------------------

JA = lexicon(
    colours="赤い, 緑 の, 青い, 黄色い, 白い, オレンジ の, 紫 の, ピンク の, 茶色 の, 黒い, グレー の",
    shapes="丸, 四角, 三角, 十字, 星, ダイヤ, 輪, ハート, 矢印", thing="物", sizes="小さい, 大きい", sides="左, 右")
japanese = Language(sentences({
    "exist": "{a} が あります", "and": "{a} と {b} が あります", "or": "{a} か {b} が あります",
    "attribute": "{a} は {x} [です|です|です|に あります]",
    "choose?": "{a} は {x} [です|です|です|に あります] か 、 {y} [です|です|です|に あります] か",
    "what?": "{a} は [何色 です|どんな 形 です|どんな 大きさ です|どちら側 に あります] か",
    "same": "{a} と {b} は [色|形|大きさ] が 同じ です",
    "different": "{a} と {b} は [色|形|大きさ] が 違います"}, ask=lambda statement: statement + " か"),
    lambda phrase, _: in_order(JA, phrase, "size colour shape"),
    lambda value, of, _: JA[value].removesuffix(" の"), "{}。", "{}？", spaces=False)

# ---- Korean: particles depend on whether the word ends in a consonant; the verb comes last, -니다 states, -니까 asks -

KO = lexicon(
    colours="빨간, 초록, 파란, 노란, 하얀, 주황색, 보라색, 분홍색, 갈색, 검은, 회색",
    shapes="원, 사각형, 삼각형, 십자, 별, 마름모, 고리, 하트, 화살표", thing="물체", sizes="작은, 큰",
    sides="왼쪽, 오른쪽")
KOREAN_PARTICLES = {  # after a consonant, after a vowel
    "": ("", ""), "은": ("은", "는"), "이": ("이", "가"), "과": ("과", "와"), "이나": ("이나", "나")}


def korean_phrase(phrase, particle):
    words = in_order(KO, phrase, "size colour shape")
    ends_in_vowel = (ord(words[-1]) - ord("가")) % 28 == 0
    return words + KOREAN_PARTICLES[particle][ends_in_vowel]


def korean_predicate(value, of, _):
    if value in SIZES:
        return {"small": "작습니", "large": "큽니"}[value]
    return KO[value].removesuffix("색") + "색" if value in COLOURS else KO[value]


korean = Language(sentences({
    "exist": "{a:이} 있습니다", "and": "{a:과} {b:이} 있습니다", "or": "{a:이나} {b:이} 있습니다",
    "attribute": "{a:은} {x}[입니다|입니다|다|에 있습니다]", "attribute?": "{a:은} {x}[입니까|입니까|까|에 있습니까]",
    "choose?": "{a:은} {x}[입니까|입니까|까|에 있습니까] {y}[입니까|입니까|까|에 있습니까]",
    "what?": "{a:은} [무슨 색입니까|무슨 모양입니까|무슨 크기입니까|어느 쪽에 있습니까]",
    "same": "{a:과} {b:은} [색이|모양이|크기가] 같습니다",
    "different": "{a:과} {b:은} [색이|모양이|크기가] 다릅니다"},
    ask=lambda statement: statement.removesuffix("다") + "까"), korean_phrase, korean_predicate)

# ---- Bengali: একটি is a, -টি the, -টির of the; no copula -------------------------------------------------------------

BN = lexicon(
    colours="লাল, সবুজ, নীল, হলুদ, সাদা, কমলা, বেগুনি, গোলাপি, বাদামি, কালো, ধূসর",
    shapes="বৃত্ত, বর্গ, ত্রিভুজ, ক্রস, তারা, রম্বস, বলয়, হৃদয়, তীর", thing="বস্তু", sizes="ছোট, বড়",
    sides="বাম দিকে, ডান দিকে")
BN = {concept: unicodedata.normalize("NFC", word) for concept, word in BN.items()}
bengali = Language(sentences({
    "exist": "একটি {a} আছে", "exist?": "একটি {a} আছে কি",
    "and": "একটি {a} এবং একটি {b} আছে", "and?": "একটি {a} এবং একটি {b} আছে কি",
    "or": "একটি {a} অথবা একটি {b} আছে", "or?": "একটি {a} অথবা একটি {b} আছে কি",
    "attribute": "{a}টি {x}", "attribute?": "{a}টি কি {x}",
    "choose?": "{a}টি {x} না {y}",
    "what?": "[{a}টির রং কী|{a}টির আকৃতি কী|{a}টির আকার কী|{a}টি কোন দিকে]",
    "same": "{a}টি ও {b}টির [রং|আকৃতি|আকার] একই", "same?": "{a}টি ও {b}টির [রং|আকৃতি|আকার] কি একই",
    "different": "{a}টি ও {b}টির [রং|আকৃতি|আকার] ভিন্ন", "different?": "{a}টি ও {b}টির [রং|আকৃতি|আকার] কি ভিন্ন"}),
    lambda phrase, _: in_order(BN, phrase, "size colour shape"), lambda value, of, _: BN[value], "{}।")

# ---- Arabic: adjectives follow and agree in gender (nouns in ة are feminine) and definiteness; no copula -------------

AR = lexicon(
    colours="أحمر/حمراء, أخضر/خضراء, أزرق/زرقاء, أصفر/صفراء, أبيض/بيضاء, برتقالي/برتقالية, "
            "بنفسجي/بنفسجية, وردي/وردية, بني/بنية, أسود/سوداء, رمادي/رمادية",
    shapes="دائرة, مربع, مثلث, صليب, نجمة, معين, حلقة, قلب, سهم", thing="شيء",
    sizes="صغير/صغيرة, كبير/كبيرة", sides="على اليسار, على اليمين")


def arabic_adjective(adjective, noun):
    return AR[adjective].split("/")[noun.endswith("ة")]


def arabic_phrase(phrase, article):
    noun = AR[phrase.shape or "thing"]
    adjectives = [arabic_adjective(adjective, noun) for adjective in (phrase.colour, phrase.size) if adjective]
    return " ".join([article + word for word in (noun, *adjectives)])


def arabic_predicate(value, of, _):
    return AR[value] if value in SHAPES or value in SIDES else arabic_adjective(value, AR[of.shape or "thing"])


arabic = Language(sentences({
    "exist": "هناك {a}", "and": "هناك {a} و{b}", "or": "هناك {a} أو {b}",
    "attribute": "{a:ال} {x}",
    "choose?": "هل {a:ال} {x} أم {y}",
    "what?": "[ما لون|ما شكل|ما حجم|في أي جهة] {a:ال}",
    "same": "{a:ال} و{b:ال} لهما نفس [اللون|الشكل|الحجم]",
    "different": "{a:ال} و{b:ال} لهما [لونان مختلفان|شكلان مختلفان|حجمان مختلفان]"},
    ask=lambda statement: "هل " + statement), arabic_phrase, arabic_predicate, "{}.", "{}؟")

# ---- Turkish: "bir" stands before the noun, a possessor is genitive, the particle mı/mi/mu/mü asks -------------------

TR = lexicon(
    colours="kırmızı, yeşil, mavi, sarı, beyaz, turuncu, mor, pembe, kahverengi, siyah, gri",
    shapes="daire/dairenin, kare/karenin, üçgen/üçgenin, haç/haçın, yıldız/yıldızın, "
           "eşkenar dörtgen/eşkenar dörtgenin, halka/halkanın, kalp/kalbin, ok/okun",
    thing="nesne/nesnenin", sizes="küçük, büyük", sides="solda, sağda")


def turkish_phrase(phrase, inflection):
    noun, genitive = TR[phrase.shape or "thing"].split("/")
    words = [TR[adjective] for adjective in (phrase.size, phrase.colour) if adjective]
    return " ".join(words + {"": [noun], "bir": ["bir", noun], "gen": [genitive]}[inflection])


def turkish_predicate(value, of, question):
    words = turkish_phrase(NounPhrase(shape=value), "bir") if value in SHAPES else TR[value]
    if question:
        last_vowel = re.findall("[aıeiouöü]", TR[value])[-1]        # of a noun: of its genitive (kalp, kalbin: mi)
        words += " m" + dict(zip("aıeiouöü", "ııiiuuüü"))[last_vowel]
    return words


turkish = Language(sentences({
    "exist": "{a:bir} var", "and": "{a:bir} ve {b:bir} var", "or": "{a:bir} veya {b:bir} var",
    "attribute": "{a} {x}", "attribute?": "{a} {x:mi}",
    "choose?": "{a} {x:mi} {y:mi}",
    "what?": "[{a:gen} rengi nedir|{a:gen} şekli nedir|{a:gen} boyutu nedir|{a} hangi tarafta]",
    "same": "{a} ile {b:gen} [rengi|şekli|boyutu] aynı",
    "different": "{a} ile {b:gen} [rengi|şekli|boyutu] farklı"}, ask=lambda statement: statement + " mı"),
    turkish_phrase, turkish_predicate)

LANGUAGES = {"en": english, "de": german, "pt": portuguese, "ru": russian, "id": indonesian, "zh": chinese,
             "ko": korean, "bn": bengali, "ar": arabic, "es": spanish, "fr": french, "ja": japanese, "tr": turkish}

# ---- Saying a form ---------------------------------------------------------------------------------------------------


class Slot:
    """A slot's content: "{a:gen}" in a sentence calls `inflect("gen")`."""
    def __init__(self, inflect):
        self.inflect = inflect

    def __format__(self, inflection):
        return self.inflect(inflection)


def words_of(form: Form, language: str) -> str:
    """The form as words between spaces, without capital and punctuation, also where the language writes no spaces."""
    grammar = LANGUAGES[language]
    slots = {name: Slot(partial(grammar.phrase, phrase)) for name, phrase in zip("ab", form.phrases)}
    for name, value in zip("xy", form.values):
        slots[name] = Slot(partial(grammar.predicate, value, form.phrases[0]))
    return grammar.sentences[form.kind + "?" * form.question, form.attribute].format(**slots)


def say(form: Form, language: str) -> str:
    """The form as that language writes it: script, spaces, capital, punctuation.

    Raises KeyError for a language or kind that does not exist, or an attribute that such a sentence cannot be about.
    """
    grammar = LANGUAGES[language]
    text = words_of(form, language)
    if not grammar.spaces:
        text = text.replace(" ", "")
    if form.kind == "phrase":
        return text
    return (grammar.question if form.question else grammar.statement).format(text[0].upper() + text[1:])


def specimens() -> list[Form]:
    """All kinds of sentence about all sizes, colours and shapes: together they hold every word and letter in use."""
    forms = []
    for index, colour in enumerate(COLOURS):
        size, shape = SIZES[index % len(SIZES)], SHAPES[index % len(SHAPES)]
        for a, b in ((NounPhrase(size, colour, shape), NounPhrase(size)),
                     (NounPhrase(size, colour), NounPhrase(shape=shape))):
            forms += [Form("phrase", (a,)), Form("phrase", (b,))]
            for question in (False, True):
                forms += [Form("exist", (phrase,), question=question) for phrase in (a, b)]
                forms += [Form(kind, pair, question=question) for kind in ("and", "or") for pair in ((a, b), (b, a))]
                for attribute, values in ATTRIBUTES.items():
                    x, y = values[index % len(values)], values[index % len(values) - 1]
                    forms.append(Form("attribute", (a,), attribute, (x,), question))
                    if question:
                        forms.append(Form("what", (a,), attribute, (), question))
                        forms.append(Form("choose", (a,), attribute, (x, y), question))
                    if attribute != "side":
                        forms += [Form(kind, pair, attribute, (), question)
                                  for kind in ("same", "different") for pair in ((a, b), (b, a))]
    return forms


# ---- Romanisation ----------------------------------------------------------------------------------------------------


def sounds(letters: str, readings: str) -> dict[str, str]:
    """Letter -> reading in Latin letters; "_" is silent."""
    return dict(zip(letters, (reading.replace("_", "") for reading in readings.split()), strict=True))


RUSSIAN_LETTERS = sounds("абвгдеёжзийклмнопрстуфхцчшщъыьэюя",
                         "a b v g d e yo zh z i y k l m n o p r s t u f kh ts ch sh shch _ y _ e yu ya")
ARABIC_LETTERS = sounds("ابتثجحخدذرزسشصضطظعغفقكلمنهويىةءأإآؤئ",
                        "a b t th j h kh d dh r z s sh s d t z a gh f q k l m n h w y a a _ a i a w y")
CHINESE_CHARACTERS = sounds("红绿蓝黄白橙紫粉棕黑灰色圆方三角十字形星菱环心箭头物体"
                            "小大左右边的有一个和或是在还什么颜状哪相同不吗",
                            "hong lu lan huang bai cheng zi fen zong hei hui se yuan fang san jiao shi zi xing xing "
                            "ling huan xin jian tou wu ti xiao da zuo you bian de you yi ge he huo shi zai hai shen me "
                            "yan zhuang na xiang tong bu ma")
HIRAGANA = sounds("あいうえおかきくけこがぎぐげごさしすせそざじずぜぞたちつてとだぢづでどなにぬねの"
                  "はひふへほばびぶべぼぱぴぷぺぽまみむめもやゆよらりるれろわをん",
                  "a i u e o ka ki ku ke ko ga gi gu ge go sa shi su se so za ji zu ze zo ta chi tsu te to da ji zu de "
                  "do na ni nu ne no ha hi fu he ho ba bi bu be bo pa pi pu pe po ma mi mu me mo ya yu yo ra ri ru re "
                  "ro wa o n")
KANJI = sounds("赤緑青黄白紫茶黒色丸四角三十字星輪矢印物小大何形左右側同違",
               "aka midori ao ki shiro murasaki cha kuro iro maru shi kaku san juu ji hoshi wa ya jirushi mono chii oo "
               "nani katachi hidari migi gawa ona chiga")
JAPANESE_CHARACTERS = {**HIRAGANA, **KANJI, "ー": "",
                       **{chr(ord(letter) + 0x60): sound for letter, sound in HIRAGANA.items()}}          # katakana
HANGUL = tuple(letters.replace("_", "").split(" ") for letters in (
    "g kk n d tt r m b pp s ss _ j jj ch k t p h", "a ae ya yae eo e yeo ye o wa wae oe yo u wo we wi yu eu ui i",
    "_ k k k n n n t l k m l l l p l m p p t t ng t t k t p t"))                       # first, middle, last
BENGALI_CONSONANTS = sounds("কখগঘঙচছজঝঞটঠডঢণতথদধনপফবভমযরলশষসহ" "\u09dc\u09df",
                            "k kh g gh ng ch chh j jh n t th d dh n t th d dh n p ph b bh m j r l sh sh s h r y")
BENGALI_VOWELS = sounds("অআইঈউঊঋএঐওঔ", "o a i i u u ri e oi o ou")
BENGALI_SIGNS = sounds("ািীুূৃেৈোৌ" "\u09cd", "a i i u u ri e oi o ou _")      # the last, virama: no vowel
BENGALI_LETTERS = BENGALI_CONSONANTS | BENGALI_VOWELS | BENGALI_SIGNS | {"ং": "ng", "\u09bc": ""}
PUNCTUATION = {"?": " ?", "？": " ?", "؟": " ?", **dict.fromkeys(".,'-¿—।。、", " ")}
LATIN_LETTERS = {"ß": "ss", "œ": "oe", "ı": "i"}           # the others lose their diacritics


def chinese_reading(word: str) -> str:
    """Pinyin without tones, one word per syllable."""
    return "".join(CHINESE_CHARACTERS[character] + " " for character in word)


def japanese_reading(word: str) -> str:
    """Hepburn, one word per word; は stands alone only as the topic particle, wa."""
    return ("wa" if word == "は" else "".join(JAPANESE_CHARACTERS[character] for character in word)) + " "


def bengali_reading(word: str) -> str:
    """A consonant carries the vowel o unless another vowel or a virama follows or the word ends."""
    word = word.replace("\u09a1\u09bc", "\u09dc").replace("\u09af\u09bc", "\u09df")     # a dot makes d r and j y
    reading = ""
    for letter, following in zip(word, word[1:] + "\u09cd"):
        reading += BENGALI_LETTERS[letter]
        if letter in BENGALI_CONSONANTS and following not in BENGALI_VOWELS and following not in BENGALI_SIGNS:
            reading += "o"
    return reading


READINGS = {"zh": chinese_reading, "ja": japanese_reading, "bn": bengali_reading}      # scripts read word by word


def letter_reading(letter: str) -> str:
    """One letter of any other script, or a punctuation mark, in lower-case ASCII."""
    letter = letter.lower()
    for letters in (RUSSIAN_LETTERS, ARABIC_LETTERS, LATIN_LETTERS, PUNCTUATION):
        if letter in letters:
            return letters[letter]
    if "가" <= letter <= "힣":
        syllable = ord(letter) - ord("가")
        return HANGUL[0][syllable // 588] + HANGUL[1][syllable // 28 % 21] + HANGUL[2][syllable % 28]
    base = unicodedata.normalize("NFD", letter)[0]
    if not base.isascii():
        raise ValueError(f"no romanisation for {letter!r} (U+{ord(letter):04X}): add it in mini_languages.py")
    return base


def normalization_rules() -> str:
    """SentencePiece's `normalization_rule_tsv`: lines "source code points <tab> target code points", hexadecimal.

    SentencePiece replaces the longest source that matches. Chinese, Japanese and Bengali have a rule per word (大 is
    da, 大きい is ookii) and, for other words, one per character; the other scripts one per letter or syllable. Covers,
    in upper and lower case, what the thirteen languages write, and no more.
    """
    rules, letters = {}, {}
    for form, language in itertools.product(specimens(), LANGUAGES):
        text = say(form, language)
        letters.update(dict.fromkeys(text + text.upper() + text.lower(), language))
        if language in READINGS:
            words = words_of(form, language).split()
            rules.update((word, READINGS[language](word)) for word in words if word not in PUNCTUATION)
    for letter, language in letters.items():
        word_by_word = language in READINGS and letter not in PUNCTUATION and not letter.isascii()
        rules.setdefault(letter, (READINGS[language] if word_by_word else letter_reading)(letter))

    def code_points(text):
        return " ".join(f"{ord(letter):X}" for letter in text)

    return "".join(f"{code_points(source)}\t{code_points(target)}\n"
                   for source, target in sorted(rules.items()) if source != target)
