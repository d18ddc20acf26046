// A page in Chromium that holds scripts of assets/ and a little markup: no studio, no Gradio.
//
// Its clock stands still until `tick`. All that it fetches is answered by the test. An error in a script fails the test.
import assert from 'node:assert/strict';
import {readFileSync} from 'node:fs';
import {after} from 'node:test';
import {isDeepStrictEqual} from 'node:util';

const {chromium} = await import(process.env.PLAYWRIGHT);
// Parts of Chromium's own window, which each new page would start.
const UNUSED = 'WebUIOmniboxPopup,WebUIOmniboxAimPopup,MediaRouter,PaintHolding,Translate,HttpsUpgrades,OptimizationHints';
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM,
  args: ['--no-sandbox', '--disable-gpu', '--disable-background-networking', `--disable-features=${UNUSED}`],
});
after(() => browser.close());

export const MARKUP = JSON.parse(process.env.MARKUP);  // of the studio, from ui/*.py
export const SENDS = JSON.parse(process.env.SENDS);  // what events run before they are sent, from there, too
const PATIENCE = Number(process.env.PATIENCE ?? 20000);  // milliseconds; a busy machine takes its time
const asset = (name) => readFileSync(`${process.env.ASSETS}/${name}`, 'utf-8');

const CLOCK = `(() => {
  const really = window.setTimeout.bind(window);
  const timers = new Map();
  let now = 0, last = 0;
  const add = (action, wait, every, given) => {
    last += 1;
    timers.set(last, {at: now + Number(wait ?? 0), every, action: () => action(...given)});
    return last;
  };
  window.setTimeout = (action, wait, ...given) => add(action, wait, null, given);
  window.setInterval = (action, wait, ...given) => add(action, wait, wait, given);
  window.clearTimeout = window.clearInterval = (id) => { timers.delete(id); };
  performance.now = () => now;
  const turn = () => new Promise((done) => really(done));
  window.tick = async (milliseconds) => {
    const end = now + milliseconds;
    await turn();  // observers and promises come first
    for (;;) {
      const [next] = [...timers].filter(([, timer]) => timer.at <= end).sort(([, a], [, b]) => a.at - b.at);
      if (!next) break;
      const [id, timer] = next;
      now = timer.at;
      if (timer.every === null) timers.delete(id); else timer.at += timer.every;
      timer.action();
      await turn();
    }
    now = end;
  };
})();`;

const contexts = new Map();  // pages are kept, and load anew for each test: a new one takes ten times as long
let port = 1000;  // each test has an origin of its own, so that nothing is stored yet

const pageWith = async (options) => {
  const key = JSON.stringify(options);
  if (!contexts.has(key)) {
    const context = await browser.newContext({viewport: {width: 800, height: 600}, ...options});
    const page = await context.newPage();
    const kept = {context, page, html: '', answer: null, errors: [], asked: []};
    page.on('pageerror', (error) => kept.errors.push(error));
    await context.route('**/*', async (route) => {
      const request = route.request();
      const {pathname, searchParams} = new URL(request.url());
      if (request.isNavigationRequest()) {
        await route.fulfill({contentType: 'text/html', body: kept.html});
        return;
      }
      const asked = {path: pathname, query: Object.fromEntries(searchParams), body: request.postDataJSON()};
      kept.asked.push(asked);
      const {errors} = kept;
      try {
        const answer = await kept.answer(asked);
        await route.fulfill(typeof answer === 'string' ? {contentType: 'image/svg+xml', body: answer}
          : typeof answer === 'number' ? {status: answer, body: 'refused'} : {json: answer ?? {}});
      } catch (error) {
        // The page may be another test's by now.
        if (!/closed|already handled|Invalid InterceptionId/.test(error.message)) errors.push(error);
      }
    });
    contexts.set(key, kept);
  }
  return contexts.get(key);
};

// A page with `scripts` in its head, behind language.js, and `markup` in its body. answer: what is answered to
// {path, query, body} that the page fetches: an object as JSON, text as a picture, a number as that status.
export const open = async (t, {scripts, markup, style = '', before = '', answer = () => PIXEL, ...options}) => {
  const kept = await pageWith(options);
  const {page} = kept;
  const head = [CLOCK, before, asset('language.js'), ...scripts.map(asset)].map((text) => `<script>\n${text}</script>`);
  kept.html = `<!doctype html><html lang="en"><head><meta charset="utf-8"><style>${style}</style>${head.join('')}</head>`
    + `<body>${markup}</body></html>`;
  Object.assign(kept, {answer, errors: [], asked: []});
  const {errors, asked} = kept;
  t.after(() => assert.deepEqual(errors, [], 'no error in a script'));
  port += 1;
  await page.goto(`http://localhost:${port}/`);
  await page.mouse.move(0, 0);
  return {
    page,
    context: kept.context,
    asked,  // what the page fetched
    run: (action, argument) => page.evaluate(action, argument),
    tick: (milliseconds) => page.evaluate((time) => window.tick(time), milliseconds),
    // Presses as a mouse does, but at once; nothing happens to a button that is disabled.
    click: (selector, how = {}) => page.evaluate(([wanted, given]) => {
      const target = document.querySelector(wanted);
      if (given.shiftKey) target.dispatchEvent(new MouseEvent('click', {bubbles: true, cancelable: true, shiftKey: true}));
      else target.click();
    }, [selector, how]),
    texts: (selector) => page.evaluate((wanted) => (
      [...document.querySelectorAll(wanted)].map((it) => it.textContent.trim())), selector),
    text: (selector) => page.evaluate((wanted) => document.querySelector(wanted).textContent.trim(), selector),
    seen: (selector) => page.evaluate((wanted) => Boolean(document.querySelector(wanted)?.offsetParent), selector),
    value: (selector) => page.evaluate((wanted) => document.querySelector(wanted).value, selector),
  };
};

// Until `read` gives what is expected.
export const eventually = async (read, expected) => {
  const end = performance.now() + PATIENCE;
  for (;;) {
    const got = await read();
    if (isDeepStrictEqual(got, expected)) return;
    if (performance.now() > end) assert.deepEqual(got, expected);
    await new Promise((done) => setTimeout(done, 10));
  }
};

// An answer that a test gives later.
export const later = () => {
  let give;
  const answer = new Promise((done) => { give = done; });
  return {answer, give};
};

export const PIXEL = '<svg xmlns="http://www.w3.org/2000/svg" width="8" height="8"><rect width="8" height="8"/></svg>';
