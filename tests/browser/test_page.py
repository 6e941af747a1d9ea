"""The chat page in Chromium: the sidebar, drafts, editing, keys, screen readers and Markdown."""

from __future__ import annotations

import pytest
from playwright.sync_api import expect
from support.browser import CHROMIUM, ChatPage
from support.concurrency import until

from aibind_postgres import ChatHistory, PostgresConversationStore, PostgresStreamStore

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def focused(chat):
    """Return the id or the label of the focused element."""
    return chat.page.evaluate("() => { const e = document.activeElement; return e.id || e.ariaLabel || e.innerText }")


def open_stored(chat, database, *contents):
    """Store a conversation of the tab's browser with alternating questions and answers, and open it in the tab."""
    history = ChatHistory()
    for index, content in enumerate(contents):
        history.append({"role": "assistant" if index % 2 else "user", "content": content})
    with PostgresConversationStore(database) as store:
        store.save(f"stored-{chat.owner}", history, owner=chat.owner)
    chat.page.evaluate("id => { location.hash = id; }", f"stored-{chat.owner}")
    expect(chat.page.locator("#messages article")).to_have_count(len(contents))


def test_sidebar_lists_and_opens_conversations(chat):
    chat.ask("The first\nquestion")
    first = chat.session_id
    chat.press("New chat")
    chat.page.locator("#welcome").wait_for()
    chat.wait_for_titles("The first question")
    chat.ask("The second question")
    chat.wait_for_titles("The second question", "The first question")
    assert chat.page.title().startswith("The second question")
    chat.page.reload()
    chat.wait_until_idle()
    chat.wait_for_titles("The second question", "The first question")
    chat.page.get_by_role("link", name="The first question").click()
    expect(chat.page.locator("#messages article.user")).to_have_text(["The first\nquestionEdit"])
    assert chat.session_id == first
    assert chat.page.locator("#conversations [aria-current]").all_text_contents() == ["The first question"]
    # Opening does not change the order.
    chat.page.reload()
    chat.wait_for_titles("The second question", "The first question")
    chat.page.go_back()
    expect(chat.page.locator("#messages article.user")).to_contain_text("The second question")


def test_list_survives_cleared_local_storage(chat):
    chat.ask("Remember me")
    chat.page.evaluate("() => localStorage.clear()")
    chat.page.goto("about:blank")
    chat.page.go_back()
    chat.wait_until_idle()
    chat.wait_for_titles("Remember me")


def test_title_is_that_of_the_model(chat, web_database):
    asked = []
    chat.page.route("**/__aibind__/title", lambda route: asked.append(route) or route.fulfill(body="A short title\n"))
    chat.ask("A long question, of which the model makes a title")
    chat.wait_for_titles("A short title")
    assert chat.page.title().startswith("A short title")
    chat.ask("Another question")
    chat.page.reload()
    chat.wait_until_idle()
    chat.wait_for_titles("A short title")
    [route] = asked
    roles = [message["role"] for message in route.request.post_data_json["messages"]]
    assert roles == ["user", "assistant"]
    with PostgresConversationStore(web_database) as store:
        assert store.get_info(chat.session_id).title == "A short title"


def test_title_is_asked_again_after_a_failure(chat, web_database):
    chat.page.route("**/__aibind__/title", lambda route: route.abort())
    chat.ask("No title yet")
    chat.wait_for_titles("No title yet")
    conversation = chat.session_id
    chat.press("New chat")
    chat.page.reload()
    chat.wait_for_titles("Untitled")
    chat.page.unroute("**/__aibind__/title")
    chat.page.get_by_role("link", name="Untitled").click()
    chat.wait_until_idle()
    with PostgresConversationStore(web_database) as store:
        until(lambda: store.get_info(conversation).title == "No title yet")
    chat.wait_for_titles("No title yet")
    assert chat.page.locator("#note").inner_text() == ""


def test_another_browser_has_no_access(chat, browser, fast_demo, web_database):
    chat.ask("My secret")
    chat.wait_for_titles("My secret")
    strange_context = browser.new_context()
    stranger = ChatPage(strange_context, chat.url)
    stranger.wait_for_note("belongs to another browser")
    stranger.wait_until_idle(empty=True)
    stranger.wait_for_titles()
    assert stranger.owner != chat.owner
    stranger.send("Let me in")
    stranger.wait_for_note("That failed")
    assert stranger.turns == []
    with PostgresConversationStore(web_database) as store:
        assert store.get_info(chat.session_id).owner == chat.owner
        assert len(store.load(chat.session_id)) == 2
    # Its own conversations are not those of the first browser.
    stranger.press("New chat")
    stranger.ask("Mine")
    stranger.wait_for_titles("Mine")
    chat.page.reload()
    chat.wait_for_titles("My secret")
    strange_context.close()


def test_cookie_of_the_page(fast_demo, context):
    def cookie():
        [cookie] = context.cookies()
        return cookie

    chat = ChatPage(context, fast_demo.url)
    first = cookie()
    assert (first["httpOnly"], first["sameSite"], first["path"]) == (True, "Lax", "/")
    chat.page.reload()
    assert cookie()["value"] == first["value"]
    context.clear_cookies()
    context.add_cookies([{"name": "browser", "value": "guessed", "url": fast_demo.url}])
    chat.page.reload()
    assert len(cookie()["value"]) == len(first["value"])


def test_lists_of_two_tabs_are_equal(chat, context, fast_demo):
    second = ChatPage(context, fast_demo.url)
    chat.ask("In the first tab")
    expect(second.page.locator("#conversations a")).to_have_text(["In the first tab"])


def test_opening_a_conversation_shows_its_end(chat):
    chat.ask("long")
    chat.ask("long")
    at_end = "() => scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight"
    assert chat.page.evaluate("() => scroller.scrollHeight > scroller.clientHeight")
    assert chat.page.evaluate(at_end) < 2
    chat.page.evaluate("() => { scroller.scrollTop = 0; }")
    chat.press("Go to the end")
    assert chat.page.evaluate(at_end) < 2
    chat.press("New chat")
    chat.page.locator("#welcome").wait_for()
    chat.page.locator("#conversations a").click()
    chat.wait_until_idle()
    assert chat.page.evaluate(at_end) < 2
    chat.page.reload()
    chat.wait_until_idle()
    assert chat.page.evaluate(at_end) < 2


def test_deleted_conversation_leaves_list_and_database(chat, stored):
    chat.ask("Delete me")
    deleted = chat.session_id
    remove = chat.page.get_by_role("button", name="Delete “Delete me”")
    remove.click()
    chat.press("Cancel")
    chat.wait_for_titles("Delete me")
    assert len(stored(chat)) == 2
    remove.click()
    chat.press("Delete")
    chat.page.locator("#welcome").wait_for()
    chat.wait_for_titles()
    assert chat.session_id != deleted
    assert chat.page.locator("#note").inner_text() == ""
    chat.page.goto(chat.url.replace(chat.session_id, deleted))
    chat.wait_for_note("This conversation has expired, was deleted")
    chat.wait_until_idle(empty=True)
    assert stored(chat) == chat.turns == []


def test_conversation_that_another_tab_deletes(chat, context):
    chat.ask("Delete me elsewhere")
    second = ChatPage(context, chat.url)
    second.wait_until_idle()
    second.page.get_by_role("button", name="Delete “Delete me elsewhere”").click()
    second.press("Delete")
    chat.wait_for_note("This conversation has expired, was deleted")
    chat.wait_for_titles()
    assert chat.turns == second.errors == []


def test_deletion_stops_a_running_answer(slow_demo, context, web_database, stored):
    chat = ChatPage(context, slow_demo.url)
    chat.send("Delete me while you write")
    chat.wait_for_answer("You")
    deleted, stream = chat.session_id, chat.stream_id
    chat.page.get_by_role("button", name="Delete “Delete me while you write”").click()
    chat.press("Delete")
    chat.page.locator("#welcome").wait_for()
    chat.page.goto(chat.url.replace(chat.session_id, deleted))
    chat.wait_until_idle(empty=True)
    chat.wait_for_titles()
    assert stored(chat) == []
    with PostgresStreamStore(web_database) as store:
        assert store.get_status(stream) is None
    assert chat.errors == []


def test_answer_continues_while_another_conversation_is_open(slow_demo, context):
    chat = ChatPage(context, slow_demo.url)
    chat.send("Go on")
    chat.wait_for_answer("You")
    chat.press("New chat")
    chat.page.locator("#welcome").wait_for()
    assert chat.page.locator("#send").is_visible()
    chat.page.locator("#conversations a").click()
    chat.wait_for_answer("You wrote")
    assert chat.turns[0] == "Go on"
    chat.press("Stop")
    chat.wait_until_idle()
    assert chat.errors == []


def test_example_questions(chat):
    examples = chat.page.locator("#welcome button")
    assert examples.count() >= 3
    answers = set()
    for index in range(examples.count()):
        question = examples.nth(index).inner_text()
        examples.nth(index).click()
        chat.wait_until_idle()
        assert chat.turns[0] == question
        assert chat.page.locator(".assistant .code pre").count() > 0
        answers.add(chat.turns[1].partition("\n\n")[2])
        chat.press("New chat")
        chat.page.locator("#welcome").wait_for()
    assert len(answers) == examples.count()


def test_input_grows_with_its_text(chat):
    height = "element => element.getBoundingClientRect().height"
    one_line = chat.page.eval_on_selector("#prompt", height)
    chat.page.fill("#prompt", "one\ntwo\nthree")
    three_lines = chat.page.eval_on_selector("#prompt", height)
    assert three_lines > one_line + 30
    chat.page.fill("#prompt", "line\n" * 100)
    assert three_lines < chat.page.eval_on_selector("#prompt", height) < chat.page.viewport_size["height"] / 2
    chat.page.fill("#prompt", "")
    assert chat.page.eval_on_selector("#prompt", height) == one_line


def test_draft_survives_editing_switching_and_reload(chat):
    chat.ask("first")
    chat.page.fill("#prompt", "a draft")
    chat.press("Edit")
    edited = chat.page.locator("article.editing")
    expect(edited).to_have_count(1)
    expect(edited).to_contain_text("Being edited")
    assert chat.page.input_value("#prompt") == "first"
    chat.page.fill("#prompt", "first, edited")
    chat.page.reload()
    expect(edited).to_have_count(1)
    assert chat.page.input_value("#prompt") == "first, edited"
    chat.page.keyboard.press("Escape")
    expect(edited).to_have_count(0)
    assert chat.page.input_value("#prompt") == "a draft"
    chat.press("New chat")
    chat.page.locator("#welcome").wait_for()
    assert chat.page.input_value("#prompt") == ""
    chat.page.locator("#conversations a").click()
    chat.wait_until_idle()
    assert chat.page.input_value("#prompt") == "a draft"
    chat.press("Edit")
    chat.page.fill("#prompt", "second")
    chat.page.keyboard.press("Enter")
    chat.page.locator(".user footer", has_text="2 / 2").wait_for()
    assert chat.page.input_value("#prompt") == "a draft"
    chat.wait_until_idle()
    assert chat.turns[0] == "second"


def test_escape_stops_the_answer(slow_demo, context):
    chat = ChatPage(context, slow_demo.url)
    chat.send("Stop by key")
    chat.wait_for_answer("You")
    chat.page.keyboard.press("Escape")
    chat.wait_for_note("Stopped.")
    chat.wait_until_idle()
    assert chat.page.locator(".assistant footer", has_text="Stopped").count() == 1
    assert chat.errors == []


def test_outcome_is_shown_after_the_server_was_unreachable(slow_demo, context):
    chat = ChatPage(context, slow_demo.url)
    chat.send("Stop me")
    chat.wait_for_answer("You")
    chat.page.route("**/__aibind__/conversations/*", lambda route: route.abort())
    chat.press("Stop")
    chat.wait_for_note("The server does not respond.")
    chat.page.unroute("**/__aibind__/conversations/*")
    chat.wait_until_idle()
    chat.wait_for_note("Stopped.")
    assert chat.errors == []


def test_use_by_keyboard_alone(chat):
    press = chat.page.keyboard.press
    chat.page.locator("#welcome").wait_for()
    assert focused(chat) == "prompt"
    chat.page.keyboard.type("By keyboard")
    press("Shift+Enter")
    chat.page.keyboard.type("alone")
    press("Enter")
    chat.wait_until_idle()
    assert chat.turns[0] == "By keyboard\nalone"

    def reach(label, key):
        """Press a key until an element has the focus."""
        for _ in range(30):
            if focused(chat) == label:
                return
            press(key)
        raise AssertionError(f"{label} cannot be reached")

    reach("Try again", "Shift+Tab")
    press("Enter")
    chat.page.locator("footer", has_text="2 / 2").wait_for()
    chat.wait_until_idle()
    reach("Previous alternative", "Shift+Tab")
    press("Enter")
    chat.page.locator("footer", has_text="1 / 2").wait_for()
    assert focused(chat) == "Next alternative"  # since the other arrow is at its end
    press("Enter")
    chat.page.locator("footer", has_text="2 / 2").wait_for()
    assert focused(chat) == "Previous alternative"
    reach("Edit", "Shift+Tab")
    press("Enter")
    assert focused(chat) == "prompt"
    assert chat.page.input_value("#prompt") == "By keyboard\nalone"
    press("Escape")
    reach("Delete “By keyboard alone”", "Shift+Tab")
    press("Enter")
    assert focused(chat) == "Cancel"
    press("Escape")
    assert focused(chat) == "Delete “By keyboard alone”"
    press("Enter")
    press("Tab")
    press("Enter")
    chat.page.locator("#welcome").wait_for()
    chat.wait_for_titles()
    reach("skip", "Shift+Tab")
    press("Enter")
    assert focused(chat) == "prompt"


def test_tab_reaches_every_control(chat):
    chat.ask("Show me what Markdown looks like")
    chat.press("Try again")
    chat.page.locator("footer", has_text="2 / 2").wait_for()
    chat.page.fill("#prompt", "a draft")
    wanted = chat.page.evaluate(
        """() => [...document.querySelectorAll("button:not(:disabled), a[href], textarea")]
            .filter((each) => each.checkVisibility({ checkVisibilityCSS: true }))
            .map((each, index) => each.dataset.number = String(index))"""
    )
    reached = set()
    for _ in range(3 * len(wanted)):
        chat.page.keyboard.press("Tab")
        reached.add(chat.page.evaluate("() => document.activeElement.dataset.number"))
    assert set(wanted) - reached == set()


def test_drawer_on_a_phone(fast_demo, browser):
    context = browser.new_context(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    chat = ChatPage(context, fast_demo.url)
    chat.ask("On a phone")
    sidebar = chat.page.get_by_role("complementary")
    expect(sidebar).to_be_hidden()
    chat.press("Conversations")
    expect(sidebar).to_be_visible()
    assert focused(chat) == "close-menu"
    chat.page.keyboard.press("Escape")
    expect(sidebar).to_be_hidden()
    assert focused(chat) == "menu"
    chat.press("Conversations")
    chat.press("New chat", last=False)
    expect(sidebar).to_be_hidden()
    chat.page.locator("#welcome").wait_for()
    chat.press("Conversations")
    chat.page.get_by_role("link", name="On a phone").click()
    expect(sidebar).to_be_hidden()
    chat.wait_until_idle()
    assert chat.turns[0] == "On a phone"
    assert chat.errors == []
    context.close()


def test_screen_reader_hears_the_answer_once(chat):
    chat.page.evaluate(
        """() => {
            window.heard = [];
            new MutationObserver(() => heard.push(announcer.textContent)).observe(announcer, { childList: true });
        }"""
    )
    chat.ask("Show me the code")
    assert chat.page.get_attribute("#announcer", "role") == "status"
    begin, end = chat.page.evaluate("() => heard")
    assert begin == "The answer is being written."
    assert "You wrote: “Show me the code”" in end
    assert "store.complete(stream)" in end
    assert "Copy code" not in end
    # No text of a message is in a live region.
    assert chat.page.locator(":is([aria-live], [role=status], [role=alert], [role=log]) article").count() == 0


def test_markdown_in_an_answer(chat, web_database):
    answer = """# Title

Some **bold**, *italic* and `code`. [A link](https://example.org/ "Its title") and https://example.net

3. three
4. four

| left | right |
|:--|--:|
| a | 1 |

```python
print("<b>")
```

- [x] done
- [ ] open"""
    open_stored(chat, web_database, "**plain**\n<i>text</i>", answer)
    assert chat.page.locator(".user .text").inner_text() == "**plain**\n<i>text</i>"
    text = chat.page.locator(".assistant .text")
    assert text.locator("h1").inner_text() == "Title"
    assert [text.locator(name).first.inner_text() for name in ("strong", "em", "p code")] == ["bold", "italic", "code"]
    links = text.locator("a").evaluate_all("links => links.map(({href, target, rel}) => [href, target, rel])")
    assert links == [[url, "_blank", "noopener noreferrer"] for url in ("https://example.org/", "https://example.net/")]
    assert text.locator("ol").get_attribute("start") == "3"
    assert text.locator("td").last.evaluate("cell => getComputedStyle(cell).textAlign") == "right"
    assert text.locator(".code pre").inner_text() == 'print("<b>")\n'
    assert text.locator(".code-header span").inner_text() == "python"
    assert text.locator("ul li").all_inner_texts() == ["☑ done", "☐ open"]


def test_copy_of_answer_and_code(fast_demo, browser):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    chat = ChatPage(context, fast_demo.url)
    chat.ask("Show me the code")
    chat.press("Copy")
    expect(chat.page.get_by_role("button", name="Copied")).to_have_count(1)
    assert chat.page.evaluate("() => navigator.clipboard.readText()") == chat.turns[1]
    chat.press("Copy code", last=False)
    expect(chat.page.locator(".copy-code", has_text="Copied")).to_have_count(1)
    code = chat.page.evaluate("() => navigator.clipboard.readText()")
    assert code.startswith("from aibind_postgres import PostgresStreamStore\n")
    context.close()


HOSTILE = [
    "<script>window.attacked = true</script>",
    "<img src=x onerror='window.attacked = true'>",
    "![picture](https://example.org/tracking.png)",
    '![picture](x"onerror="window.attacked=true)',
    "[link](javascript:window.attacked=true)",
    "[link](data:text/html,<script>window.attacked=true</script>)",
    "<a href='javascript:window.attacked=true'>link</a>",
    "<svg><style><img src=x onerror='window.attacked = true'></style></svg>",
    "<form action='https://example.org/'><button id=prompt>Send</button></form>",
    "<div style='position: fixed; inset: 0'>cover</div>",
    '```"><img src=x onerror=window.attacked=true>\ncode\n```',
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=x onerror=window.attacked=true&gt;'>",
]


def test_hostile_markdown_is_harmless(chat, web_database):
    requests = []
    chat.page.on("request", lambda request: requests.append(request.url))
    open_stored(chat, web_database, "Attack me", "\n\n".join(HOSTILE))
    text = chat.page.locator(".assistant .text")
    names = text.locator("*").evaluate_all(
        "all => [...new Set(all.flatMap((each) => [each.localName, ...each.getAttributeNames()]))]"
    )
    assert {"script", "img", "svg", "style", "form", "math", "id", "onerror", "src", "action"} & set(names) == set()
    links = text.locator("a").evaluate_all("links => links.map((link) => link.getAttribute('href'))")
    assert [link for link in links if link and not link.startswith("https://")] == []
    for link in text.locator("a:not([href])").all():
        link.click()
    assert chat.page.evaluate("() => window.attacked") is None
    assert "<div style='position: fixed; inset: 0'>cover</div>" in text.inner_text()
    assert [url for url in requests if "example.org" in url] == []


def test_page_loads_only_from_its_server(fast_demo, context):
    requests = []
    context.on("request", lambda request: requests.append(request.url))
    chat = ChatPage(context, fast_demo.url)
    chat.ask("Show me what Markdown looks like")
    assert [url for url in requests if not url.startswith((fast_demo.url, "data:"))] == []
    assert any(url.endswith("/marked.esm.js") for url in requests)
