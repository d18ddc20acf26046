// assets/references.js: the order of pictures by drag, which of them is selected, and how often they were cleared.
import assert from 'node:assert/strict';
import test from 'node:test';

import {eventually, open} from './page.mjs';

// As Gradio renders a gallery: a wrapper of buttons, the last of which clears, and an item for each picture.
const gallery = (pictures) => `<div class="references"><div class="icon-button-wrapper">
  <button class="upload">Upload</button><button class="clear">Clear</button></div>
  ${pictures.map((name) => `<div class="gallery-item"><button class="thumbnail-item">${name}</button>
    <button class="delete-button">x</button></div>`).join('')}</div>`;
const FORMS = `<div id="edit" class="sheet">${gallery(['a'])}</div>
  <div id="multi" class="sheet">${gallery(['a', 'b', 'c'])}<button id="multi-move"></button></div>`;
const STYLE = `body { margin: 0; height: 3000px; } .references { display: flex; gap: 20px; padding: 10px; }
  .gallery-item { position: relative; width: 100px; height: 100px; } .thumbnail-item { width: 100px; height: 100px; }
  .delete-button { position: absolute; top: 0; right: 0; }`;
// Of the press that moves a picture: what was to be moved then. And which pictures were clicked.
const HEAR = `addEventListener('DOMContentLoaded', () => {
  window.moves = [];
  window.clicked = [];
  document.getElementById('multi-move').addEventListener('click', () => moves.push(studioReferences.moved));
  for (const item of document.querySelectorAll('#multi .thumbnail-item')) {
    item.addEventListener('click', () => clicked.push(item.textContent));
  }
});`;

const opened = async (t, options = {}) => {
  const it = await open(t, {scripts: ['references.js'], markup: FORMS, style: STYLE, before: HEAR, ...options});
  const places = await it.run(() => [...document.querySelectorAll('#multi .gallery-item')].map((item) => {
    const {left, top} = item.getBoundingClientRect();
    return [left + 40, top + 60];
  }));
  return {...it, places, mouse: it.page.mouse, heard: () => it.run(() => [moves, clicked])};
};
const marked = (it, name) => it.texts(`#multi .gallery-item.${name} .thumbnail-item`);

test('a picture is dragged to the front, and to the end', async (t) => {
  const it = await opened(t);
  const [first, , third] = it.places;
  await it.mouse.move(...third);
  await it.mouse.down();
  await it.mouse.move(...first, {steps: 3});
  assert.deepEqual([await marked(it, 'dragged'), await marked(it, 'goes-before')], [['c'], ['a']]);
  await it.mouse.up();
  assert.deepEqual(await it.heard(), [['2,0'], []]);
  assert.deepEqual([await marked(it, 'dragged'), await marked(it, 'goes-before')], [[], []]);
  await it.mouse.move(...first);
  await it.mouse.down();
  await it.mouse.move(...third, {steps: 3});
  assert.deepEqual(await marked(it, 'goes-behind'), ['c']);
  await it.mouse.up();
  assert.deepEqual(await it.heard(), [['2,0', '0,2'], []]);
});

test('a press that hardly moves is a click', async (t) => {
  const it = await opened(t);
  const [[x, y]] = it.places;
  await it.mouse.move(x, y);
  await it.mouse.down();
  await it.mouse.move(x + 4, y + 3);
  await it.mouse.up();
  assert.deepEqual(await it.heard(), [[], ['a']]);
});

test('a picture that is put back selects nothing, and the next click does', async (t) => {
  const it = await opened(t);
  const [[x, y]] = it.places;
  await it.mouse.move(x, y);
  await it.mouse.down();
  await it.mouse.move(x + 30, y + 20, {steps: 3});
  await it.mouse.move(x, y, {steps: 3});
  await it.mouse.up();
  assert.deepEqual(await it.heard(), [[], []]);
  await it.mouse.down();
  await it.mouse.up();
  assert.deepEqual(await it.heard(), [[], ['a']]);
});

test('a picture that is dropped far from all others stays', async (t) => {
  const it = await opened(t);
  const [[x, y]] = it.places;
  await it.mouse.move(x, y);
  await it.mouse.down();
  await it.mouse.move(x, y + 300, {steps: 3});
  await it.mouse.up();
  assert.deepEqual(await it.heard(), [[], []]);
});

test('a press on the cross of a picture, and on a picture to edit, drags nothing', async (t) => {
  const it = await opened(t);
  for (const selector of ['#multi .delete-button', '#edit .thumbnail-item']) {
    const box = await it.page.locator(selector).first().boundingBox();
    await it.mouse.move(box.x + 4, box.y + 4);
    await it.mouse.down();
    await it.mouse.move(box.x + 104, box.y + 40, {steps: 3});
    assert.equal(await it.run(() => document.querySelectorAll('.dragged').length), 0);
    await it.mouse.up();
  }
  assert.deepEqual((await it.heard())[0], []);
});

test('a button that was let go of outside the window ends the drag', async (t) => {
  const it = await opened(t);
  const [[x, y], second] = it.places;
  await it.mouse.move(x, y);
  await it.mouse.down();
  await it.mouse.move(x + 30, y, {steps: 3});
  assert.deepEqual(await marked(it, 'dragged'), ['a']);
  await it.run(() => document.body.dispatchEvent(
    new PointerEvent('pointermove', {bubbles: true, isPrimary: true, pointerType: 'mouse', buttons: 0})));
  assert.deepEqual(await marked(it, 'dragged'), []);
  await it.mouse.move(...second);
  await it.mouse.up();
  assert.deepEqual((await it.heard())[0], []);
});

const fingers = async (t) => {
  const it = await opened(t, {hasTouch: true});
  const session = await it.context.newCDPSession(it.page);
  const touch = (type, ...points) => session.send('Input.dispatchTouchEvent', {
    type, touchPoints: points.map(([x, y]) => ({x, y})),
  });
  return {...it, touch};
};

test('a finger that rests first drags', async (t) => {
  const it = await fingers(t);
  const [[x, y], , third] = it.places;
  await it.touch('touchStart', [x, y]);
  await it.tick(349);
  assert.deepEqual(await marked(it, 'dragged'), []);
  await it.tick(1);
  assert.deepEqual(await marked(it, 'dragged'), ['a']);
  await it.touch('touchMove', [x + 20, y]);
  await it.touch('touchMove', third);
  await it.touch('touchEnd');
  assert.deepEqual((await it.heard())[0], ['0,2']);
  assert.equal(await it.run(() => scrollY), 0, 'the page did not scroll with it');
});

test('a finger that moves before it rested scrolls', async (t) => {
  const it = await fingers(t);
  const [[x, y]] = it.places;
  await it.touch('touchStart', [x, y]);
  await it.tick(200);
  await it.touch('touchMove', [x, y - 20]);
  await it.tick(1000);
  assert.deepEqual(await marked(it, 'dragged'), []);
  await it.touch('touchMove', [x, y - 60]);
  await eventually(() => it.run(() => scrollY > 0), true);
  await it.touch('touchEnd');
  assert.deepEqual((await it.heard())[0], []);
});

test('a finger that is lifted before it rested drags nothing later', async (t) => {
  const it = await fingers(t);
  await it.touch('touchStart', it.places[0]);
  await it.tick(300);
  await it.touch('touchEnd');
  await it.tick(1000);
  assert.deepEqual(await marked(it, 'dragged'), []);
});

test('a drag that the system takes away moves nothing', async (t) => {
  const it = await fingers(t);
  await it.touch('touchStart', it.places[0]);
  await it.tick(350);
  await it.touch('touchMove', it.places[2]);
  await it.touch('touchCancel');
  assert.deepEqual(await marked(it, 'dragged'), []);
  assert.deepEqual((await it.heard())[0], []);
});

test('a second finger neither drags nor ends the drag of the first', async (t) => {
  const it = await fingers(t);
  const [first, second, third] = it.places;
  await it.touch('touchStart', first);
  await it.tick(350);
  await it.touch('touchStart', first, second);
  await it.touch('touchMove', first, [second[0] + 30, second[1]]);
  assert.deepEqual(await marked(it, 'dragged'), ['a']);
  await it.touch('touchMove', third, second);
  await it.touch('touchEnd');
  assert.deepEqual((await it.heard())[0], ['0,2']);
});

test('the selected picture is told as it is when it is asked for', async (t) => {
  const it = await opened(t);
  const selected = (index) => it.run((place) => {
    document.querySelectorAll('#multi .thumbnail-item').forEach((item, at) => item.classList.toggle('selected', at === place));
    return window.studioReferences.selected();
  }, index);
  assert.deepEqual([await selected(-1), await selected(0), await selected(2), await selected(1)], ['', '0', '2', '1']);
});

test('clears are counted for each form, and each is told once', async (t) => {
  const it = await opened(t);
  const ask = (what, form) => it.run(([name, of]) => window.studioReferences[name](of), [what, form]);
  assert.deepEqual([await ask('cleared', 'multi'), await ask('toClear', 'multi')], ['0', '']);
  await it.click('#multi .clear');
  assert.deepEqual([await ask('cleared', 'multi'), await ask('cleared', 'edit')], ['1', '0']);
  assert.deepEqual([await ask('toClear', 'multi'), await ask('toClear', 'multi')], ['1', ''], 'told once');
  await it.click('#multi .clear');
  await it.click('#multi .clear');
  assert.deepEqual([await ask('toClear', 'multi'), await ask('toClear', 'multi')], ['3', ''], 'two at once are one word');
  assert.equal(await ask('cleared', 'multi'), '3', 'what is asked later knows of it, told or not');
  await it.click('#edit .clear');
  assert.deepEqual([await ask('toClear', 'edit'), await ask('toClear', 'multi')], ['1', '']);
});

test('a clear is counted before anything else hears of the press, and no other button is one', async (t) => {
  const it = await opened(t);
  await it.run(() => {
    window.counted = [];
    for (const button of document.querySelectorAll('#multi button')) {
      button.addEventListener('click', (event) => {
        window.counted.push([button.className, window.studioReferences.cleared('multi')]);
        event.stopPropagation();
      });
    }
  });
  for (const selector of ['.upload', '.thumbnail-item', '.delete-button', '.clear']) await it.click(`#multi ${selector}`);
  assert.deepEqual(await it.run(() => window.counted), [
    ['upload', '0'], ['thumbnail-item', '0'], ['delete-button', '0'], ['clear', '1'],
  ]);
});
