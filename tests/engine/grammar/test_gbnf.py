"""Grammars as llama.cpp's have the language that they say, overlaps and all."""

import time

import pytest

from engine.grammar import gbnf
from engine.grammar.structured_outputs import StructuredOutputs
from tests.engine.grammar.accepting import accepts

SQL = """
    root ::= select_statement

    select_statement ::= "SELECT " column " from " table " where " condition
    column ::= "col_1 " | "col_2 "
    table ::= "table_1 " | "table_2 "
    condition ::= column "= " number
    number ::= "1 " | "2 "
"""
JSON = r"""
# all of JSON
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws
array  ::=
  "[" ws (
            value
    ("," ws value)*
  )? "]" ws
string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws
number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
ARITHMETIC = r"""
root  ::= (expr "=" ws term "\n")+
expr  ::= term ([-+*/] term)*
term  ::= ident | num | "(" ws expr ")" ws
ident ::= [a-z] [a-z0-9_]* ws
num   ::= [0-9]+ ws
ws    ::= [ \t\n]*
"""
CHESS = """
root ::= "1. " move " " move "\\n" ([1-9] [0-9]? ". " move " " move "\\n")+
move ::= (pawn | nonpawn | castle) [+#]?
nonpawn ::= [NBKQR] [a-h]? [1-8]? "x"? [a-h] [1-8]
pawn ::= ([a-h] "x")? [a-h] [1-8] ("=" [NBKQR])?
castle ::= "O-O" "-O"?
"""
JAPANESE = r"""
root ::= jp-char+ ([ \t\n] jp-char+)*
jp-char ::= hiragana | katakana | punctuation | cjk
hiragana ::= [ぁ-ゟ]
katakana ::= [ァ-ヿ]
punctuation ::= [、-〾]
cjk ::= [一-鿿]
"""
GOOD: dict[str, tuple[str, list[str], list[str]]] = {
    "SQL": (SQL, ["SELECT col_1  from table_1  where col_2 = 1 "], ["SELECT x", ""]),
    "JSON": (JSON, ['{"a": [1, 2.5e3, "x\\n"], "b": null}', "{}"], ['{"a":}', "[]"]),
    "arithmetic": (ARITHMETIC, ["1+2=x\n"], ["1+=", "1+2=x"]),
    "chess": (CHESS, ["1. e4 e5\n2. Nf3 Nc6\n"], ["1. e9"]),
    "japanese": (JAPANESE, ["漢字 かな"], ["a"]),
    "long escapes": (r"root ::= [\u4E00-\u9FFF]+ [\U0001F600-\U0001F64F]?", ["漢字", "漢😀"], ["a", "😀"]),
    "list": (r'root ::= item+' "\n" r'item ::= "- " [^\r\n\x0b\x0c\x85\u2028\u2029]+ "\n"', ["- a\n- b\n"], ["- a"]),
    "counts": ('root ::= "a"{2} "b"{1,3} "c"{2,} [0-9]{,2}', ["aabcc", "aabbbccc12"], ["ab", "aabcc123", "aabbbbcc"]),
    "names by case": ('root ::= fooBar foobar\nfooBar ::= "a"\nfoobar ::= "b"', ["ab"], ["a", "aa"]),
    "names by hyphen": ('root ::= a-b a_b aB\na-b ::= "1"\na_b ::= "2"\naB ::= "3"', ["123"], ["1", "111"]),
    "a rule named start": ('root ::= start\nstart ::= "x"', ["x"], ["y"]),
    "negated class": (r'root ::= [^\]"]+', ["abc"], ["]", ""]),
    "slash and dash": (r"root ::= [a/\-b]+ [+-]", ["a/-b+", "a-"], ["x"]),
    "dash at the end": ("root ::= [a-]+", ["a-a"], ["b"]),
    "marks of other classes": ("root ::= [&&~|^.]+", ["&~|^."], ["x"]),
    "quotes": (r'root ::= "\"" [^"]* "\""', ['"abc"'], ["abc"]),
    "any": ("root ::= . .*", ["ab", "\n", "é"], [""]),
    "any by an empty negation": ("root ::= [^]", ["a", "\n"], ["ab"]),
    "empty literal": ('root ::= "a" b\nb ::= "x" | ""', ["a", "ax"], ["b"]),
    "empty first": ('root ::= "a" b\nb ::= | "x"', ["a", "ax"], ["axx"]),
    "left recursion": ('root ::= root "+" [0-9] | [0-9]', ["1+2+3", "1"], ["+", "1+"]),
    "recursion": ('root ::= "(" root? ")"', ["(())"], ["(", "(()"]),
    "comments": ('# c\nroot ::= "a" # d "\n | "b"', ["a", "b"], ["c"]),
    "alternatives on lines": ('root ::=\n  "a"\n  | "b"\n  | "c"\n', ["c"], ["d"]),
    "line ends": ('root ::= a\r\na ::= "x"\r\n', ["x"], ["y"]),
    "short escapes": (r'root ::= [\x41-\x43]+ "\x44" "\t\\\u00e9"', ["ABD\t\\é"], ["E"]),
    "overlaps": ('root ::= ("ab" "x" | [a-z] [a-z] "y") "!"?', ["abx", "aby!"], ["abz"]),
    "greed": ('root ::= [a-z]* "x" [a-z]{2}', ["abxcd", "xxxxx"], ["abx"]),
    "repeats of repeats": ('root ::= "a"{2}+', ["aa", "aaaa"], ["a", "aaa"]),
}  # fmt: skip
BAD = {
    'root ::= "a': "line 1: the text ends within quotes",
    'root ::= "a"\n\nb ::= (\n"x"': "line 4: ) is expected",
    'root ::= "a")': "line 1: a ) too many",
    "root ::= foo": "line 1: there is no rule named foo",
    'root ::= "a"\n | x | y\ny ::= "b"': "line 2: there is no rule named x",
    'start ::= "a"': "line 1: there is no rule named root",
    'root ::= "a"\nroot ::= "b"': "line 2: the rule root is there twice",
    "root ::= 'a'": 'line 1: "\'" is not expected',
    "root ::= /a/": "line 1: '/' is not expected",
    "root ::= []": "line 1: an empty",
    "root ::= [b-a]": "line 1: the range b-a is empty",
    'root ::= "a"{3,2}': "line 1: {3,2} is empty",
    'root ::= "a"{}': "line 1: {n}, {n,}, {,m} or {n,m}",
    r'root ::= "\q"': r"line 1: unknown escape \q",
    r'root ::= "\x4"': "line 1: 2 hexadecimal digits",
    r'root ::= "\ud800"': "line 1: d800 is no character",
    "root ::= " + "(" * 1000 + '"a"': "line 1: more than 50 parentheses",
    'root ::= "a"' + "*" * 10**5: "line 1: more than 49 repeats",
    'root "a" ::=': "line 1: ::= is expected",
    '"a" ::= "b"': "line 1: a rule's name is expected",
}


@pytest.mark.parametrize(("text", "good", "bad"), GOOD.values(), ids=GOOD)
def test_the_language_is_kept(text: str, good: list[str], bad: list[str]) -> None:
    form = StructuredOutputs(grammar=text)
    assert [accepts(form, answer) for answer in good + bad] == [True] * len(good) + [False] * len(bad)


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_mistakes_are_told_with_their_line(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:  # noqa: PT011 (what it says is looked at)
        gbnf.to_lark(text)
    assert str(raised.value).startswith(message)


def test_what_is_gbnf() -> None:
    assert gbnf.is_gbnf('root ::= "a"') and not gbnf.is_gbnf('start: "a"')


def test_a_long_grammar_takes_no_time() -> None:
    rules = "\n".join(f'r{number} ::= r{number + 1} "x"' for number in range(10_000))
    begun = time.thread_time()
    gbnf.to_lark(f'root ::= r0\n{rules}\nr10000 ::= "y"')
    assert time.thread_time() - begun < 5
