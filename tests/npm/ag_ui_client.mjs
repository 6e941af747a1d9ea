// Runs scenarios with the published client of AG-UI, its verifier included, and writes what each client has got.
import { HttpAgent, runHttpRequest, transformHttpEventStream } from "@ag-ui/client";

const warnings = [];
console.warn = (...texts) => warnings.push(texts.join(" "));

// The package has `connectAgent`, and leaves the request to subclasses.
class ReplayAgent extends HttpAgent {
  connect(input) {
    const url = `${this.url}/${encodeURIComponent(input.runId)}`;
    const init = { headers: this.headers, signal: this.abortController.signal };
    return transformHttpEventStream(runHttpRequest(() => this.fetch(url, init)));
  }
}

const [url] = process.argv.slice(2);

function client(prompt = "", threadId = "thread") {
  const initialMessages = prompt ? [{ id: "question", role: "user", content: prompt }] : [];
  return new ReplayAgent({ url, threadId, initialMessages });
}

// Calls a method that receives a run. `reached` is resolved after some text deltas.
function receive(agent, method, runId, deltas = 2) {
  const result = { events: [], failed: null, error: null };
  let reach;
  const reached = new Promise((resolve) => (reach = resolve));
  const subscriber = {
    onEvent: ({ event }) => {
      result.events.push(event);
      if (event.type === "TEXT_MESSAGE_CONTENT" && --deltas === 0) reach();
    },
    onRunErrorEvent: ({ event }) => void (result.error = event.message),
    onRunFailed: ({ error }) => void (result.failed = String(error)),
  };
  const ended = agent[method]({ runId }, subscriber)
    .catch((error) => void (result.failed ??= String(error)))
    .then(() => {
      reach();
      return { ...result, messages: agent.messages, state: agent.state };
    });
  return { reached, ended };
}

const stop = async (runId) => {
  const response = await fetch(`${url}/${encodeURIComponent(runId)}/stop`, { method: "POST" });
  return [response.status, await response.json()];
};

const scenarios = {
  // One client from the beginning, one from half-way on, and one after the end.
  async follow(prompt, runId) {
    const first = receive(client(prompt), "runAgent", runId);
    await first.reached;
    const second = receive(client(prompt), "connectAgent", runId);
    return [await first.ended, await second.ended, await receive(client(prompt), "connectAgent", runId).ended];
  },
  async stop(prompt, runId) {
    const first = receive(client(prompt), "runAgent", runId);
    await first.reached;
    const answer = await stop(runId);
    return [await first.ended, await receive(client(prompt), "connectAgent", runId).ended, answer];
  },
  // The client disconnects, and the run continues.
  async leave(prompt, runId) {
    const agent = client(prompt);
    const first = receive(agent, "runAgent", runId);
    await first.reached;
    agent.abortRun();
    return [await first.ended, await receive(client(prompt), "connectAgent", runId).ended];
  },
  async repeat(prompt, runId) {
    const first = receive(client(prompt), "runAgent", runId);
    await first.reached;
    return [await first.ended, await receive(client(prompt), "runAgent", runId).ended];
  },
  // A thread of two runs of one client.
  async thread(prompt, runId) {
    const agent = client(prompt);
    await receive(agent, "runAgent", `${runId} 1`).ended;
    agent.addMessage({ id: "question 2", role: "user", content: prompt });
    return [await receive(agent, "runAgent", `${runId} 2`).ended];
  },
  async missing(prompt, runId) {
    return [await receive(client(), "connectAgent", runId).ended, await stop(runId)];
  },
  async invalid() {
    const response = await fetch(url, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" });
    return [response.status, await response.json()];
  },
};

let input = "";
for await (const part of process.stdin) input += part;
const { scenario, prompt, runId } = JSON.parse(input);
const clients = await scenarios[scenario](prompt, runId);
console.log(JSON.stringify({ clients, warnings }));
