// Shows the chunks of a stream while they are written. Texts are inserted as text, never as HTML.
"use strict";
{
  const PAUSE = 1000; // milliseconds between two requests
  const root = document.getElementById("aibind-tail");
  const text = document.getElementById("aibind-text");
  const state = document.getElementById("aibind-state");
  const all = document.getElementById("aibind-all");
  const stop = document.getElementById("aibind-stop");
  let last = null;
  let run = 0; // counts the loops, of which the newest one continues

  const add = ({ event, data }) => {
    if (event === "message") {
      text.append(data);
      return;
    }
    const line = document.createElement("span");
    line.className = "aibind-event";
    line.textContent = `[${event}] ${data}`;
    text.append(line);
  };

  const show = (page) => {
    const atEnd = text.scrollTop + text.clientHeight >= text.scrollHeight - 10;
    if (last === null) {
      all.hidden = page.after === 0;
    }
    page.chunks.forEach(add);
    last = page.last;
    state.textContent = `${page.state}: chunk ${page.last} of ${page.total}${page.error ? `: ${page.error}` : ""}`;
    if (stop && page.state !== "active") {
      stop.hidden = true;
    }
    if (atEnd) {
      text.scrollTop = text.scrollHeight;
    }
  };

  const poll = async (own) => {
    let pause = PAUSE;
    try {
      const url = last === null ? root.dataset.url : `${root.dataset.url}?after=${last}`;
      const response = await fetch(url, { headers: { Accept: "application/json" }, redirect: "error" });
      if (response.status === 404) {
        state.textContent = "the stream was deleted";
        return;
      }
      if (!response.ok) {
        throw new Error(String(response.status));
      }
      const page = await response.json();
      if (own !== run) {
        return;
      }
      show(page);
      if (page.complete) {
        return;
      }
      if (page.last < page.total) {
        pause = 0;
      }
    } catch {
      state.textContent = "the server cannot be reached; trying again";
    }
    if (own === run) {
      setTimeout(() => poll(own), pause);
    }
  };

  all.addEventListener("click", () => {
    text.replaceChildren();
    last = 0;
    all.hidden = true;
    run += 1;
    poll(run);
  });

  poll(run);
}
