// assets/stream.js: what the server answers reaches Gradio, whatever the order in which its connections bring it.
import assert from 'node:assert/strict';
import {readFileSync} from 'node:fs';
import test from 'node:test';
import vm from 'node:vm';

const SCRIPT = readFileSync(`${process.env.ASSETS}/stream.js`, 'utf-8');
const BASE = 'http://studio.test/gradio_api/queue';
const END = {msg: 'close_stream', event_id: null};
const completed = (id, output = '') => ({msg: 'process_completed', event_id: id, output});

// A server that the test plays. `streams` are those that were opened, oldest first.
class Server {
  streams = [];
  other = [];
  join = (id) => ({event_id: id});
  streamStatus = 200;

  fetch = async (resource, options) => {
    const request = new Request(resource, options);
    const {pathname} = new URL(request.url);
    if (pathname.endsWith('/queue/join')) return this.join(request);
    if (!pathname.endsWith('/queue/data')) {
      this.other.push([resource, options]);
      return new Response('other');
    }
    if (this.streamStatus !== 200) return new Response('no', {status: this.streamStatus});
    const stream = {};
    const body = new ReadableStream({
      start(controller) {
        const encoder = new TextEncoder();
        stream.bytes = (bytes) => controller.enqueue(bytes);
        stream.write = (text) => stream.bytes(encoder.encode(text));
        stream.say = (...messages) => messages.forEach((one) => stream.write(`data: ${JSON.stringify(one)}\n\n`));
        stream.close = () => controller.close();
        stream.break = () => controller.error(new Error('the connection is lost'));
      },
    });
    this.streams.push(stream);
    return new Response(body, {headers: {'Content-Type': 'text/event-stream'}});
  };
}

// The page: its `fetch` once the script has run, and what Gradio does with it.
const opened = () => {
  const server = new Server();
  const window = {
    fetch: server.fetch, location: {href: 'http://studio.test/'}, URL, Request, Response, ReadableStream, TextEncoder,
    TextDecoderStream, JSON, Set, Promise,
  };
  window.window = window;
  vm.runInNewContext(SCRIPT, window);
  const ask = async (id, status = 200) => {
    server.join = () => Response.json(status === 200 ? {event_id: id} : {detail: 'no'}, {status});
    return (await window.fetch(`${BASE}/join?session_hash=x`, {method: 'POST', body: '{}'})).json();
  };
  // Opens a stream as Gradio does; `heard` grows, `over` is "closed" or the error.
  const listen = async () => {
    const response = await window.fetch(`${BASE}/data?session_hash=x`);
    const stream = {response, heard: [], raw: '', over: null};
    if (!response.ok) return stream;
    (async () => {
      const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
      try {
        for (;;) {
          const {value, done} = await reader.read();
          if (done) { stream.over = 'closed'; return; }
          stream.raw += value;
          stream.heard = stream.raw.split('\n\n').filter((text) => text.startsWith('data: '))
            .map((text) => JSON.parse(text.slice(6)));
        }
      } catch (error) {
        stream.over = error;
      }
    })();
    return stream;
  };
  return {server, window, ask, listen};
};

// Until nothing is left to do but to wait for the server: everything here is a promise or a turn of a stream.
const settled = async () => {
  for (let turn = 0; turn < 20; turn += 1) await new Promise((done) => setImmediate(done));
};
const ids = (stream) => stream.heard.map((message) => message.event_id);

test('what is asked between the end of a stream and the news of it is answered', async () => {
  const {server, ask, listen} = opened();
  await ask('first');
  const gradio = await listen();
  server.streams[0].say(completed('first'));
  await settled();
  await ask('second');  // the server has ended the stream, and the page has not read so
  server.streams[0].say(END);
  server.streams[0].close();
  await settled();
  assert.equal(server.streams.length, 2, 'another stream is opened, though Gradio asked for none');
  server.streams[1].say(completed('second', 'here'));
  await settled();
  assert.deepEqual(gradio.heard, [completed('first'), completed('second', 'here')]);
  assert.equal(gradio.over, null, 'for Gradio it is one stream that does not end');
});

test('a page at rest holds no stream, and opens one as soon as something is asked', async () => {
  const {server, ask, listen} = opened();
  await ask('first');
  const gradio = await listen();
  for (let time = 0; time < 3; time += 1) {
    const stream = server.streams.at(-1);
    stream.say(completed(time ? `again ${time}` : 'first'), END);
    stream.close();
    await settled();
    assert.equal(server.streams.length, time + 1, 'nothing is open');
    await ask(`again ${time + 1}`);
    await settled();
    assert.equal(server.streams.length, time + 2, 'one is open');
  }
  assert.deepEqual(ids(gradio), ['first', 'again 1', 'again 2']);
  assert.equal(gradio.over, null);
});

test('what is answered before it is confirmed is not waited for', async () => {
  const {server, ask, window, listen} = opened();
  await ask('running');
  const gradio = await listen();
  let confirm;
  server.join = () => new Promise((done) => { confirm = () => done(Response.json({event_id: 'quick'})); });
  const asked = window.fetch(`${BASE}/join`, {method: 'POST', body: '{}'});
  await settled();
  server.streams[0].say(completed('quick'), completed('running'));
  await settled();
  confirm();
  await asked;
  server.streams[0].say(END);
  server.streams[0].close();
  await settled();
  assert.deepEqual(ids(gradio), ['quick', 'running']);
  assert.equal(server.streams.length, 1, 'no stream is opened for what is answered already');
  await ask('quick');  // and the same id counts again later
  await settled();
  assert.equal(server.streams.length, 2);
});

test('a stream is opened anew until all is answered', async () => {
  const {server, ask, listen} = opened();
  await ask('one');
  await ask('two');
  await listen();
  server.streams[0].say(completed('one'), END);
  server.streams[0].close();
  await settled();
  assert.equal(server.streams.length, 2);
  server.streams[1].say(completed('two'), END);
  server.streams[1].close();
  await settled();
  assert.equal(server.streams.length, 2);
});

test('only the last message answers: what is told on the way is still waited for', async () => {
  const {server, ask, listen} = opened();
  await ask('one');
  const gradio = await listen();
  server.streams[0].say({msg: 'process_starts', event_id: 'one'}, {msg: 'process_generating', event_id: 'one'}, END);
  server.streams[0].close();
  await settled();
  assert.equal(server.streams.length, 2);
  assert.deepEqual(gradio.heard.map((message) => message.msg), ['process_starts', 'process_generating']);
});

test('what was refused is not waited for', async () => {
  const {server, ask, listen} = opened();
  assert.deepEqual(await ask('never', 503), {detail: 'no'});
  await ask('one');
  await listen();
  server.streams[0].say(completed('one'), END);
  server.streams[0].close();
  await settled();
  assert.equal(server.streams.length, 1);
});

test('messages arrive whole, however they are cut, and lines of a proxy go with them', async () => {
  const {server, ask, listen} = opened();
  await ask('one');
  const gradio = await listen();
  const bytes = new TextEncoder().encode(
    `: still here\n\ndata: ${JSON.stringify(completed('one', '狐 🦊'))}\n\ndata: ${JSON.stringify(END)}\n\n`);
  for (const byte of bytes) server.streams[0].bytes(Uint8Array.of(byte));
  server.streams[0].close();
  await settled();
  assert.deepEqual(gradio.heard, [completed('one', '狐 🦊')]);
  assert.ok(gradio.raw.startsWith(': still here\n\n'));
  assert.equal(server.streams.length, 1);
});

test('a stream that breaks off is an error for Gradio, and nothing is waited for any more', async () => {
  const {server, ask, listen} = opened();
  await ask('lost');
  const gradio = await listen();
  server.streams[0].break();
  await settled();
  assert.match(String(gradio.over), /the connection is lost/);
  await ask('one');
  const next = await listen();
  server.streams[1].say(completed('one'), END);
  server.streams[1].close();
  await settled();
  assert.equal(server.streams.length, 2, 'the lost answer is not expected');
  assert.equal(next.over, null);
});

test('a stream that ends without saying so ends for Gradio', async () => {
  const {server, ask, listen} = opened();
  await ask('one');
  const gradio = await listen();
  server.streams[0].close();
  await settled();
  assert.equal(gradio.over, 'closed');
  assert.equal(server.streams.length, 1);
});

test('a stream that Gradio gave up is not opened again', async () => {
  const {server, ask, listen} = opened();
  await ask('one');
  const old = await listen();
  const next = await listen();
  server.streams[0].say(END);
  server.streams[0].close();
  await settled();
  assert.equal(old.over, 'closed');
  assert.equal(server.streams.length, 2, 'the two that Gradio asked for');
  server.streams[1].say(completed('one'));
  await settled();
  assert.deepEqual(ids(next), ['one']);
});

test('a stream at rest ends when Gradio has another and something is asked', async () => {
  const {server, ask, listen} = opened();
  await ask('one');
  const old = await listen();
  server.streams[0].say(completed('one'), END);
  server.streams[0].close();
  await settled();
  await listen();
  await ask('two');
  await settled();
  assert.equal(old.over, 'closed');
  assert.equal(server.streams.length, 2);
});

test('a stream that is refused is told to Gradio', async () => {
  const {server, listen} = opened();
  server.streamStatus = 404;
  assert.equal((await listen()).response.status, 404);
});

test('all else is fetched as it was asked for', async () => {
  const {server, window} = opened();
  const options = {headers: {'X-Test': '1'}};
  for (const address of ['http://studio.test/config', new URL('http://studio.test/queue/state')]) {
    assert.equal(await (await window.fetch(address, options)).text(), 'other');
  }
  assert.equal(await (await window.fetch(new Request('http://studio.test/theme.css'))).text(), 'other');
  assert.deepEqual(server.other.map(([, given]) => given), [options, options, undefined]);
});
