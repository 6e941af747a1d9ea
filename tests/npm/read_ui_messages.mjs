// Runs the published reader of UI message streams. Input: JSON, a list of {message?, chunks}, and of texts to parse as
// partial JSON. Output: the messages, whether the chunks have the published schema, and the parsed texts.
import { readFileSync } from 'node:fs';
import { asSchema, parsePartialJson, readUIMessageStream, uiMessageChunkSchema } from 'ai';

const END = { type: 'data-end-of-test', data: null };

async function read(message, chunks) {
  let index = -1;
  let failed = false;
  // The reader reads the type of each chunk that it processes.
  const observed = chunks.map((chunk, position) =>
    Object.defineProperty({ ...chunk }, 'type', {
      enumerable: true,
      get: () => {
        index = Math.max(index, position);
        return chunk.type;
      },
    }),
  );
  const stream = new ReadableStream({
    start(controller) {
      observed.forEach(chunk => controller.enqueue(chunk));
      controller.close();
    },
  });
  let last;
  const options = { message: message && structuredClone(message), stream, onError: () => { failed = true; } };
  for await (const state of readUIMessageStream(options)) {
    last = state;
  }
  return { last, failedAt: failed ? index : undefined };
}

// The reader emits no message after some chunks, so a part is added at the end. Chat clients stop at an error chunk;
// the reader alone would read on.
async function finalMessage({ message, chunks }) {
  const error = chunks.findIndex(chunk => chunk.type === 'error');
  const readable = error < 0 ? chunks : chunks.slice(0, error);
  let result = await read(message, [...readable, END]);
  if (result.failedAt !== undefined) {
    result = await read(message, [...readable.slice(0, result.failedAt), END]);
  }
  if (result.failedAt !== undefined || result.last.parts.pop().type !== END.type) {
    throw new Error(`cannot read ${JSON.stringify(chunks)}`);
  }
  return result.last;
}

const { streams, texts, valid } = JSON.parse(readFileSync(0, 'utf8'));
const schema = asSchema(uiMessageChunkSchema);
const messages = [];
for (const stream of streams) {
  messages.push(await finalMessage(stream));
}
const invalid = [];
for (const chunk of valid) {
  if (!(await schema.validate(chunk)).success) {
    invalid.push(chunk);
  }
}
const values = [];
for (const text of texts) {
  values.push((await parsePartialJson(text)).value === undefined ? [] : [(await parsePartialJson(text)).value]);
}
process.stdout.write(JSON.stringify({ messages, invalid, values }));
