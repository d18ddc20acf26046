// assets/compare.js: the original as long as a button is held, in turns with the result, and beside it with a slider.
import assert from 'node:assert/strict';
import test from 'node:test';

import {eventually, MARKUP, open, PIXEL} from './page.mjs';

const STYLE = `body { margin: 0; } figure { position: relative; margin: 0; width: 400px; height: 300px; }
  figure > img { width: 100%; height: 100%; } figure > .before { position: absolute; inset: 0; }
  .comparison:not([hidden]) { position: absolute; bottom: 0; left: 0; } [hidden] { display: none !important; }
  dialog { margin: 0; padding: 0; border: 0; }`;

// On the stage: what HOLDING of ui/stage/compare.py connects.
const stage = async (t, options = {}) => {
  const markup = `<div id="compare">${MARKUP.hold}</div>`;
  const it = await open(t, {scripts: ['compare.js'], markup, style: STYLE, ...options});
  await it.run(() => {
    window.seen = [];
    const set = (on) => window.seen.push(on);
    window.studioCompare.hold(document.querySelector('.hold'), set);
    window.stop = window.studioCompare.flicker(document.querySelector('.flicker'), set);
  });
  const pressed = () => it.page.locator('.flicker').getAttribute('aria-pressed');
  return {...it, pressed, heard: () => it.run(() => window.seen.splice(0))};
};

// The large view of History, open.
const viewer = async (t, options = {}) => {
  const it = await open(t, {
    scripts: ['compare.js'], style: STYLE,
    markup: `${MARKUP.history}<button id="elsewhere">elsewhere</button>`, ...options,
  });
  const show = (source) => it.run((address) => {
    const dialog = document.querySelector('.viewer');
    if (!dialog.open) dialog.showModal();
    window.studioCompare.viewer(dialog, address);
  }, source);
  const state = () => it.run(() => {
    const figure = document.querySelector('.viewer figure');
    const range = figure.querySelector('input');
    return {
      bar: !figure.querySelector('.comparison').hidden,
      classes: [...figure.classList].sort(),
      slide: figure.querySelector('.slide').getAttribute('aria-pressed'),
      flicker: figure.querySelector('.flicker').getAttribute('aria-pressed'),
      range: range.hidden ? null : range.value,
      at: figure.style.getPropertyValue('--at'),
    };
  });
  const source = () => it.run(() => document.querySelector('.viewer .before').getAttribute('src'));
  return {...it, show, state, source, mouse: it.page.mouse};
};
const RESULT = {bar: true, classes: [], slide: 'false', flicker: 'false', range: null, at: '50%'};

test('the original is shown as long as the button is held: by mouse', async (t) => {
  const it = await stage(t);
  await it.page.locator('.hold').hover();
  await it.page.mouse.down();
  assert.deepEqual(await it.heard(), [true]);
  await it.page.mouse.move(700, 500);  // the pointer is the button's until it is let go
  assert.deepEqual(await it.heard(), []);
  await it.page.mouse.up();
  assert.equal((await it.heard()).at(-1), false);
});

test('the original is shown as long as the button is held: by keys', async (t) => {
  const it = await stage(t);
  await it.page.locator('.hold').focus();
  for (const key of ['Space', 'Enter']) {
    await it.page.keyboard.down(key);
    assert.equal((await it.heard()).at(-1), true);
    await it.page.keyboard.up(key);
    assert.equal((await it.heard()).at(-1), false);
  }
  await it.page.keyboard.down('a');
  assert.deepEqual(await it.heard(), []);
  await it.page.keyboard.up('a');
  await it.heard();
  await it.page.keyboard.down('Space');
  await it.run(() => document.querySelector('.flicker').focus());  // the key is let go elsewhere
  assert.deepEqual(await it.heard(), [true, false]);
});

test('a long press opens no menu, and one that is taken away ends', async (t) => {
  const it = await stage(t);
  const left = await it.run(() => {
    const button = document.querySelector('.hold');
    const menu = button.dispatchEvent(new MouseEvent('contextmenu', {bubbles: true, cancelable: true}));
    button.dispatchEvent(new PointerEvent('pointercancel', {bubbles: true}));
    return menu;
  });
  assert.equal(left, false);
  assert.deepEqual(await it.heard(), [false]);
});

test('flicker shows each of the two for half a second, until it is pressed again', async (t) => {
  const it = await stage(t);
  await it.click('.flicker');
  assert.deepEqual([await it.heard(), await it.pressed()], [[true], 'true']);
  await it.tick(499);
  assert.deepEqual(await it.heard(), []);
  await it.tick(1);
  assert.deepEqual(await it.heard(), [false]);
  await it.tick(1000);
  assert.deepEqual(await it.heard(), [true, false]);
  await it.tick(500);
  await it.click('.flicker');
  assert.deepEqual([await it.heard(), await it.pressed()], [[true, false], 'false'], 'it ends with the result');
  await it.tick(5000);
  assert.deepEqual(await it.heard(), []);
});

test('flicker ends where its button is not seen any more, and from outside', async (t) => {
  const it = await stage(t);
  await it.click('.flicker');
  await it.run(() => { document.getElementById('compare').style.display = 'none'; });
  await it.tick(500);
  assert.deepEqual([await it.heard(), await it.pressed()], [[true, false], 'false']);
  await it.run(() => { document.getElementById('compare').style.display = ''; });
  await it.tick(5000);
  await it.click('.flicker');
  await it.run(() => window.stop());
  await it.tick(5000);
  assert.deepEqual([await it.heard(), await it.pressed()], [[true, false], 'false']);
});

test('who asks for less motion has each press show the other one', async (t) => {
  const it = await stage(t, {reducedMotion: 'reduce'});
  await it.click('.flicker');
  await it.tick(5000);
  assert.deepEqual([await it.heard(), await it.pressed()], [[true], 'true']);
  await it.click('.flicker');
  await it.tick(5000);
  assert.deepEqual([await it.heard(), await it.pressed()], [[false], 'false']);
});

test('the slider lies between the two, and moves by drag and by keys', async (t) => {
  const it = await viewer(t);
  await it.show('/history/before/7');
  assert.deepEqual(await it.state(), RESULT);
  await it.click('.slide');
  assert.deepEqual(await it.state(), {...RESULT, classes: ['comparing'], slide: 'true', range: '50'});
  await it.page.locator('.comparison input').focus();
  await it.page.keyboard.press('ArrowRight');
  assert.deepEqual([(await it.state()).range, (await it.state()).at], ['51', '51%']);
  await it.mouse.move(200, 100);
  await it.mouse.down();
  await it.mouse.move(100, 100, {steps: 2});
  assert.equal((await it.state()).at, '25%');
  await it.mouse.up();
  await it.mouse.move(300, 100);
  assert.equal((await it.state()).range, '25', 'only while it is held');
  await it.click('.slide');
  assert.deepEqual((await it.state()).classes, []);
  await it.mouse.move(200, 100);
  await it.mouse.down();
  await it.mouse.move(300, 100);
  await it.mouse.up();
  assert.equal((await it.state()).at, '25%', 'without the slider nothing is dragged');
});

test('a press on a button of the picture moves no slider', async (t) => {
  const it = await viewer(t);
  await it.show('/history/before/7');
  await it.click('.slide');
  await it.page.locator('.hold').hover();
  await it.mouse.down();
  assert.deepEqual((await it.state()).classes, ['comparing', 'held']);
  await it.mouse.up();
  assert.deepEqual([(await it.state()).classes, (await it.state()).at], [['comparing'], '50%']);
});

test('the original is fetched when it is about to be shown', async (t) => {
  const it = await viewer(t);
  await it.show('/history/before/7');
  assert.equal(await it.source(), null);
  await it.page.locator('.hold').hover();
  await eventually(() => it.asked.map(({path}) => path), ['/history/before/7']);
  await it.show('/history/before/8');
  assert.equal(await it.source(), null, 'that of the last picture is gone');
  await it.run(() => document.querySelector('.flicker').focus());
  await eventually(() => it.asked.map(({path}) => path), ['/history/before/7', '/history/before/8']);
});

test('another picture ends what was done with the last', async (t) => {
  const it = await viewer(t);
  await it.show('/history/before/7');
  await it.click('.slide');
  await it.click('.flicker');
  assert.deepEqual((await it.state()).classes, ['comparing', 'held']);
  await it.show('/history/before/8');
  assert.deepEqual(await it.state(), RESULT);
  await it.tick(5000);
  assert.deepEqual(await it.state(), RESULT);
  assert.deepEqual(it.asked.filter(({path}) => path.endsWith('8')), [], 'nor is anything fetched for it');
  await it.show(null);
  assert.deepEqual(await it.state(), {...RESULT, bar: false});
});

test('a closed view is at rest when it opens again', async (t) => {
  const it = await viewer(t);
  await it.show('/history/before/7');
  await it.click('.flicker');
  await it.page.keyboard.press('Escape');
  await eventually(async () => (await it.state()).flicker, 'false');
  await it.tick(5000);
  assert.deepEqual(await it.state(), {...RESULT, bar: false});
});

test('a view that opens again before the browser tells that it was closed keeps its buttons', async (t) => {
  const it = await viewer(t);
  await it.show('/history/before/7');
  await it.run(() => {
    const dialog = document.querySelector('.viewer');
    window.closed = new Promise((done) => { dialog.addEventListener('close', done); });
    dialog.close();
    dialog.showModal();
    window.studioCompare.viewer(dialog, '/history/before/8');
    return window.closed;
  });
  assert.deepEqual(await it.state(), RESULT);
});

test('an original that cannot be had is not offered', async (t) => {
  const it = await viewer(t, {answer: ({path}) => (path.includes('before') ? 404 : PIXEL)});
  await it.show('/history/before/7');
  await it.click('.slide');
  await eventually(() => it.state(), {...RESULT, bar: false});
  await it.tick(5000);
  assert.deepEqual(await it.state(), {...RESULT, bar: false});
});
