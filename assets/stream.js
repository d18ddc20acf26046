// All that the server answers comes in one stream of messages. The server ends it when nothing is left to answer, and
// Gradio opens another one when it asks again and knows that the last has ended. What is asked in between is lost: its
// question arrives over another connection when the stream has just been ended, and is confirmed before the page reads
// so. It would wait until something else is asked. Here the stream never ends for Gradio: it is opened anew by this
// script for as long as something is unanswered, and as soon as something is asked.
(() => {
  'use strict';
  const fetched = window.fetch.bind(window);
  const unanswered = new Set();  // the ids of what was asked
  const early = new Set();  // of what was answered before it was confirmed that it was asked
  let asked = () => {};
  let newest = null;  // Gradio asks for another stream where it gave one up

  const ask = async (request) => {
    const response = await fetched(request);
    if (response.ok) {
      const {event_id: id} = await response.clone().json();
      if (id && !early.delete(id)) { unanswered.add(id); asked(); }
    }
    return response;
  };

  // Hands on what a stream says but that it ends, and returns whether it said so: else it broke off.
  const read = async (response, controller) => {
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    const encoder = new TextEncoder();
    let rest = '', ended = false;
    for (;;) {
      const {value, done} = await reader.read();
      if (done) return ended;
      const texts = (rest + value).split('\n\n');
      rest = texts.pop();
      for (const text of texts) {
        // What is between here and the server may add lines of its own, so that a quiet connection is not closed.
        const {msg, event_id: id} = text.startsWith('data: ') ? JSON.parse(text.slice(6)) : {};
        if (msg === 'close_stream') { ended = true; continue; }
        if (msg === 'process_completed' && !unanswered.delete(id)) early.add(id);
        controller.enqueue(encoder.encode(`${text}\n\n`));
      }
    }
  };

  const answers = async (request) => {
    const first = await fetched(request.clone());
    if (!first.ok) return first;
    newest = request;
    const body = new ReadableStream({
      async start(controller) {
        try {
          let response = first;
          while (await read(response, controller)) {
            while (newest === request && !unanswered.size) await new Promise((done) => { asked = done; });
            if (newest !== request) break;
            response = await fetched(request.clone());
          }
          controller.close();
        } catch (error) {
          if (newest === request) unanswered.clear();  // Gradio says that the connection is lost, and expects no answer
          controller.error(error);
        }
      },
    });
    return new Response(body, {headers: first.headers});
  };

  window.fetch = (resource, options) => {
    const path = new URL(resource.url ?? resource, location.href).pathname;
    if (path.endsWith('/queue/join')) return ask(new Request(resource, options));
    if (path.endsWith('/queue/data')) return answers(new Request(resource, options));
    return fetched(resource, options);
  };
})();
