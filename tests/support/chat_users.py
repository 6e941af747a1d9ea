"""Simulated users of a chat. Each asks questions over HTTP, and follows and resumes the answers as a browser does."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException, HTTPResponse
from typing import Any

from support.webapps import JSON, events

LEASE = 3.0  # seconds, of the chat's streams
HANG = 90  # seconds without a response or an event after which a client counts as hanging
PRODUCING_PERIOD = 0.5  # seconds since the last token for which an answer counts as being produced

LOST = (OSError, HTTPException)  # raised if the process at the other end is killed


def token(stream_id: str, number: int, pid: int) -> str:
    """Return the text of a token, which is unique."""
    return f"{number}:{stream_id}:{pid} "


def producer_of(stream_id: str, number: int, text: str) -> int | None:
    """Return the PID of the process that has produced a token. None if the text is not that of the token."""
    match = re.fullmatch(rf"{number}:{re.escape(stream_id)}:(\d+) ", text)
    return int(match[1]) if match else None


@dataclass
class AskedQuestion:
    """A question for which the user has received the response header.

    Attributes:
        prompt: The question.
        stream_id: The id of the stream that answers it.
        left: Whether the user stopped reading before the end of the answer.
    """

    prompt: str
    stream_id: str
    left: bool = False


class LeftError(Exception):
    """The user has stopped reading before the end of an answer."""


@dataclass
class Reading:
    """The tokens that one reader of a stream has received. Times are those of `time.time()`.

    Attributes:
        stream_id: The id of the stream.
        texts: The tokens, from the first on.
        connected_at: The time of the last response header.
        ended_at: The time at which the reader received the end. None if it stopped before.
        error: The error text of the stream, if any.
    """

    stream_id: str
    texts: list[str] = field(default_factory=list)
    connected_at: float = 0.0
    ended_at: float | None = None
    error: str | None = None


class Browser(threading.Thread):
    """A thread that sends the requests of one user, and records the results."""

    def __init__(self, port: int, user: str, seed: int, finished: threading.Event) -> None:
        super().__init__(daemon=True, name=user)
        self.session_id = f"conversation of {user}"
        self.readings: list[Reading] = []
        self.resumes = 0
        self.error: BaseException | None = None
        self.last_token: tuple[int, float] = (0, 0.0)  # the producer of the last token, and the time at which it came
        self._port = port
        self._user = user
        self._random = random.Random(seed)
        self._finished = finished

    def run(self) -> None:
        try:
            self.use()
        except BaseException as error:
            self.error = error

    def use(self) -> None:
        raise NotImplementedError

    def request(self, method: str, path: str, body: Any = None) -> HTTPResponse:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=HANG)
        headers = {"Connection": "close", "User": self._user, **({} if body is None else JSON)}
        try:
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            return connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def open_conversation(self) -> Any:
        """Return the conversation, or None if it does not exist. Repeat the request if its connection is lost."""
        return self._repeat(lambda: self._conversation("GET"))

    def show(self, message_id: str) -> Any:
        """Make a message the end of the current path, and return the conversation as the page then loads it."""
        self._repeat(lambda: self._conversation("PATCH", {"activeLeafId": message_id}))
        return self.open_conversation()

    def _conversation(self, method: str, body: Any = None) -> Any:
        path = f"/__aibind__/conversations/{self.session_id.replace(' ', '%20')}"
        with closing(self.request(method, path, body)) as response:
            content = json.loads(response.read())
            assert response.status in (200, 404), content
            return content if response.status == 200 else None

    def follow(
        self, stream_id: str, response: HTTPResponse | None = None, reload: float = 0.0, leave: float = 0.0
    ) -> None:
        """Read a stream to its end. Resume if the connection is lost.

        Args:
            stream_id: The id of the stream.
            response: An event stream from its beginning. Default: None, which resumes it.
            reload: The probability after each token that the user reloads the page.
            leave: The probability after each token that the user stops reading.

        Raises:
            LeftError: The user has stopped reading.
        """
        reading = Reading(stream_id)
        self.readings.append(reading)
        while True:
            if response is None:
                after = len(reading.texts)
                path = f"/__aibind__/stream/resume?id={stream_id}&after={after}"
                response = self._repeat(lambda path=path: self.request("GET", path))
                self.resumes += 1
            assert response.status == 200, f"{response.status} for {stream_id}"
            reading.connected_at = time.time()
            try:
                if self._read(response, reading, reload, leave):
                    return
                if self._random.random() < 0.5:  # a reload of the page: from the beginning
                    self.check_page(stream_id)
                    reading = Reading(stream_id)
                    self.readings.append(reading)
            except LOST:
                self._pause()
            response = None

    def check_page(self, stream_id: str) -> None:
        """Check the page after a reload."""

    def _read(self, response: HTTPResponse, reading: Reading, reload: float, leave: float) -> bool:
        """Read events. Return True at the end of the stream, and False if the user has reloaded the page."""
        with closing(events(response)) as received:
            for event in received:
                if event.event == "message":
                    number = len(reading.texts) + 1
                    assert event.id == f"{number}", f"{event} is not event {number} of {reading.stream_id}"
                    reading.texts.append(event.data)
                    self.last_token = (producer_of(reading.stream_id, number, event.data) or 0, time.monotonic())
                    if self._random.random() < reload:
                        return False
                    if self._random.random() < leave:
                        raise LeftError
                elif event.event == "error":
                    reading.error = event.data
                elif event.event == "done":
                    reading.ended_at = time.time()
                    return True
                else:
                    assert event.event == "stream-id", f"{event}"
        raise ConnectionError("the events have ended without `done`")

    def _repeat(self, call: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + HANG
        while True:
            try:
                return call()
            except LOST:
                assert time.monotonic() < deadline, "the server does not respond"
                self._pause()

    def _pause(self) -> None:
        time.sleep(self._random.uniform(0.1, 0.5))


class User(Browser):
    """A user who asks until `finished` is set, and receives the end of each answer."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.asked: list[AskedQuestion] = []
        self.unanswered_requests: set[str] = set()  # prompts without a response header
        self._has_last_answer = False

    def use(self) -> None:
        number = 0
        while not self._finished.is_set() or not self._has_last_answer:
            number += 1
            self._has_last_answer = self._ask(f"{self._user} {number}")
        for asked in self.asked:
            if asked.left:
                self.follow(asked.stream_id)

    def _ask(self, prompt: str) -> bool:
        """Ask, and follow the answer. Return whether the user has received its end."""
        uses_worker = self._random.random() < 0.4
        if uses_worker:
            self.open_conversation()  # saves the abandoned answer to the previous question
        try:
            path = "/ask" if uses_worker else "/__aibind__/stream"
            response = self.request("POST", path, {"prompt": prompt, "sessionId": self.session_id})
        except LOST:
            self.unanswered_requests.add(prompt)
            self._pause()
            return False
        if response.status not in (200, 202):
            raise AssertionError(f"{prompt}: {response.status} {response.read().decode(errors='replace')}")
        stream_id = response.headers["X-Stream-Id"]
        asked = AskedQuestion(prompt, stream_id)
        self.asked.append(asked)
        if uses_worker:
            response.close()
        try:
            self.follow(stream_id, None if uses_worker else response, reload=0.01, leave=0.01)
        except LeftError:
            asked.left = True
        return not asked.left

    def check_page(self, stream_id: str) -> None:
        page = self.open_conversation()
        assert page is not None, f"{self.session_id} is lost"
        questions = [node["metadata"].get("streamId") for node in page["history"]["nodes"].values()]
        assert questions.count(stream_id) == 1, f"{stream_id} has {questions.count(stream_id)} questions"


class SecondTab(Browser):
    """Another tab of a user. It finds the running answers through the conversation, and follows them."""

    def use(self) -> None:
        while not self._finished.is_set():
            page = self.open_conversation()
            stream_id = page and page["activeStreamId"]
            if stream_id:
                self.follow(stream_id)
            else:
                time.sleep(0.1)
