"""Reads samples as a person would: what is stated line by line, and whether the questions have the right answers."""

import re

_LINE = re.compile(rb"(?<=\n)<<(key|table|add|let|copy|ask|all|value|paste) ([^<>\n]*)>>(?=\n)")
_KEY = re.compile(r"[a-z]+-[a-z]+-\d\d")
_VALUE = re.compile(r"\d{5}")


class Reader:
    """What a sample has stated so far.

    Attributes:
        bound: values of a key or variable, words of a passage, by (verb of the question, name).
        questions: start of the answer, its text, of each question; in order.
        stated: names, in order, one more time for each statement.
    """

    def __init__(self, text: bytes):
        self.bound: dict[tuple[str, str], str] = {}
        self.questions: list[tuple[int, bytes]] = []
        self.stated: list[tuple[str, str]] = []
        for match in _LINE.finditer(text):
            verb, content = match[1].decode(), match[2].decode()
            if verb == "copy":
                self._bind("paste", *content.split(": "))
            elif verb == "paste":
                self._answer(match, content, ": ", _KEY)
            elif verb in ("ask", "all", "value"):
                self._answer(match, content, " = ", re.compile(r"[a-z]\d+") if verb == "value" else _KEY)
            else:
                for pair in content.split(", "):
                    self._state(verb, *pair.split(" = "))

    def _state(self, verb: str, name: str, content: str) -> None:
        if verb == "let":
            assert re.fullmatch(r"[a-z]\d+", name), name
            self._bind("value", name, content if _VALUE.fullmatch(content) else self.bound["value", content])
            return
        assert _KEY.fullmatch(name) and _VALUE.fullmatch(content), (name, content)
        if verb == "add":
            before = self.bound.get(("all", name))
            self._bind("all", name, content if before is None else f"{before} {content}")
        else:
            self._bind("ask", name, content)

    def _bind(self, verb: str, name: str, content: str) -> None:
        self.bound[verb, name] = content
        self.stated.append((verb, name))

    def _answer(self, match: re.Match[bytes], content: str, mark: str, form: re.Pattern[str]) -> None:
        verb = match[1].decode()
        name, answer = content.split(mark)
        assert form.fullmatch(name), name
        assert self.bound.get((verb, name)) == answer, f"{verb} {name}: {answer}, stated {self.bound.get((verb, name))}"
        self.questions.append((match.start(2) + len(name) + len(mark), f"{answer}>>".encode()))
