"""The answers of the stand-in for a model: fixed texts in Markdown, chosen by a word of the question."""

import re

from aibind_postgres import Generation

_INTRODUCTION = (
    "This is a fixed text, since no language model is configured. It is stored and sent like the answer of a model."
)

_SURVIVAL = """\
Each piece of it is a numbered row in PostgreSQL before you see it. **Try to interrupt it:**

- **Reload this page.** The text is still here, and continues.
- **Open a second tab.** Both show the same text.
- **Disconnect from the network.** When it is back, your browser sends the number of the last event that it received, \
and continues with the next one, without duplicates.
- **Kill the server** in the middle of a sentence. The text so far is kept, and the page reports that the answer is \
incomplete.

A browser needs no library for this. After a lost connection, an `EventSource` resumes by itself:

```js
const answer = new EventSource(`/__aibind__/stream/resume?id=${id}`);
answer.onmessage = (event) => text.append(event.data);
answer.addEventListener("done", () => answer.close());
```

Press **Stop** or the Escape key: the text so far is kept as well."""

_CODE = """\
A producer appends the tokens of a model, as they arrive:

```python
from aibind_postgres import PostgresStreamStore

with PostgresStreamStore("postgresql://localhost/mydb") as store:
    stream = store.create()
    for token in ("Hello", ", ", "world", "!"):
        store.append(stream, token)
    store.complete(stream)
```

Each token gets a sequence number, and is stored when `append` returns. A reader in any process follows the stream \
until its end, and resumes after the last number that it has:

```python
last = 0
for seq, data in store.read_from(stream, after_seq=last):
    print(data, end="")
    last = seq
```

Run `aibind-postgres migrate` once before, to create the tables."""

_BRANCHES = """\
A conversation is a tree of messages, and you see one path through it.

| you do | the tree gets |
|---|---|
| send a message | a message at the end of the path |
| **Edit** a question | another question beside the old one |
| **Try again** | another answer to the same question |

Use the arrows below a message to switch between its alternatives. *No message is ever overwritten:*

```
What is 2 + 2?
├── 5
└── 4          ← Try again
What is 2 + 3? ← Edit
└── 5
```

Two tabs may change the conversation at the same time: their changes are merged."""

_MARKDOWN = """\
### A recipe for pancakes

1. Mix **250 g** of flour, **half a litre** of milk and **3 eggs**.
2. Let the batter rest for *twenty minutes*.
3. Bake each pancake for about a minute on each side.

> Too many cooks spoil the batter.

| people | flour | milk | eggs |
|:--|--:|--:|--:|
| 2 | 125 g | 0.25 l | 2 |
| 4 | 250 g | 0.5 l | 3 |

- [x] Buy eggs
- [ ] Invite friends

```python
def flour(people: int) -> float:
    \"\"\"Return grams.\"\"\"
    return 62.5 * people
```

HTML is shown as text: <b>not bold</b>. See [CommonMark](https://commonmark.org/) for the syntax."""

_TITLE_LENGTH = 80  # characters

_TEXTS = {"code": _CODE, "branch": _BRANCHES, "markdown": _MARKDOWN}


def tokens(generation: Generation) -> list[str]:
    """Return the pieces of an answer to the last message, of the size of a model's tokens, or a title in one piece.

    A token has at most 8 characters, with leading white space. An answer repeats the question, and a title is its
    beginning.
    """
    if generation.kind == "title":
        return [" ".join(generation.messages[0]["content"].split())[:_TITLE_LENGTH]]
    question = generation.messages[-1]["content"]
    text = next((text for word, text in _TEXTS.items() if word in question.lower()), _SURVIVAL)
    literal = re.sub(r"([\\`*_\[\]<>&#|~])", r"\\\1", " ".join(question.split()))  # Markdown would interpret these
    again = "*This is another answer to the same question.*\n\n" if generation.body.get("regenerate") else ""
    return re.findall(
        r"\s*\S{1,8}", f"You wrote: “{literal}”\n\n{again}{_INTRODUCTION}\n\n{text}\n\nThis is the end of the text. ✦"
    )
