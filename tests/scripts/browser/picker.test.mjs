// assets/picker.js: pictures of History as references, in the order in which they are chosen.
import assert from 'node:assert/strict';
import test from 'node:test';

import {eventually, later, MARKUP, open, PIXEL} from './page.mjs';

const PAGE = `<div id="history-root"></div>${MARKUP.picker}<button id="edit-pick"></button><button id="multi-pick"></button>`;
const STYLE = `#picker .grid { display: grid; grid-template-columns: repeat(3, 100px); height: 250px; overflow: auto; }
  #picker .tile { height: 100px; } #picker [hidden] { display: none; }`;
const HEAR = `addEventListener('DOMContentLoaded', () => {
  window.pressed = [];
  for (const button of document.querySelectorAll('button[id$=-pick]')) {
    button.addEventListener('click', () => pressed.push([button.id, studioHistory.asked]));
  }
});`;
const entries = (...ids) => ids.map((id) => ({id: String(id), prompt: `picture ${id}`, created: 0, missing: false}));

// answer: the page that is answered to the words and the cursor.
const opened = async (t, answer) => {
  const it = await open(t, {
    scripts: ['compare.js', 'history.js', 'picker.js'], markup: PAGE, style: STYLE, before: HEAR,
    answer: ({path, query}) => (path === '/history/page' ? answer(query) : PIXEL),
  });
  return {
    ...it,
    start: (form) => it.run((name) => window.studioPicker.open(name), form),
    ids: () => it.run(() => [...document.querySelectorAll('#picker .tile')].map((tile) => tile.dataset.id)),
    tile: (id) => it.click(`#picker .tile[data-id="${id}"]`),
    places: () => it.texts('#picker .place'),
    said: () => it.text('#picker [role=status]'),
    add: () => it.run(() => (document.querySelector('#picker .add').hidden ? null : document.querySelector('#picker .add').textContent)),
    isOpen: () => it.run(() => document.getElementById('picker').open),
    pressed: () => it.run(() => window.pressed.splice(0)),
    search: (words) => it.run((text) => {
      const field = document.querySelector('#picker input');
      field.value = text;
      field.dispatchEvent(new Event('input', {bubbles: true}));
    }, words),
  };
};
const all = (...ids) => () => ({entries: entries(...ids), more: null});

test('pictures are sent in the order in which they were chosen', async (t) => {
  const it = await opened(t, all(4, 3, 2, 1));
  await it.start('multi');
  await eventually(it.ids, ['4', '3', '2', '1']);
  assert.equal(await it.add(), null);
  await it.tile(2);
  assert.equal(await it.add(), 'Add 1 picture');
  await it.tile(4);
  await it.tile(3);
  assert.deepEqual(await it.places(), ['2', '3', '1', '']);
  await it.tile(4);  // not that one, after all
  assert.deepEqual([await it.places(), await it.add()], [['', '2', '1', ''], 'Add 2 pictures']);
  const pressed = await it.run(() => [...document.querySelectorAll('#picker .tile')].map((one) => one.ariaPressed));
  assert.deepEqual(pressed, ['false', 'true', 'true', 'false']);
  await it.click('#picker .add');
  assert.deepEqual([await it.pressed(), await it.isOpen()], [[['multi-pick', '2,3']], false]);
});

test('a form of one picture takes the first that is pressed', async (t) => {
  const it = await opened(t, all(2, 1));
  await it.start('edit');
  await eventually(it.ids, ['2', '1']);
  await it.tile(1);
  assert.deepEqual([await it.pressed(), await it.isOpen()], [[['edit-pick', '1']], false]);
});

test('each time it opens nothing is chosen yet', async (t) => {
  const it = await opened(t, ({words}) => ({entries: words ? [] : entries(2, 1), more: null}));
  await it.start('multi');
  await eventually(it.ids, ['2', '1']);
  await it.tile(1);
  await it.search('nothing');
  await it.tick(200);
  await eventually(it.said, 'Nothing matches.');
  assert.equal(await it.add(), 'Add 1 picture', 'what was chosen before a search stays chosen');
  await it.click('#picker .close');
  assert.deepEqual([await it.isOpen(), await it.pressed()], [false, []]);
  await it.start('multi');
  await eventually(it.ids, ['2', '1']);
  assert.deepEqual([await it.places(), await it.add(), await it.value('#picker input')], [['', ''], null, '']);
  await it.tile(2);
  await it.click('#picker .add');
  assert.deepEqual(await it.pressed(), [['multi-pick', '2']], 'one press is one choice: it hears once');
  await it.start('multi');
  await it.page.mouse.click(2, 2);  // beside it
  assert.equal(await it.isOpen(), false);
});

test('a search is asked once one stops typing, and an older answer is not shown', async (t) => {
  const {answer, give} = later();
  const asked = [];
  const it = await opened(t, async ({words = ''}) => {
    asked.push(words);
    if (words === 'fox') await answer;
    return {entries: entries(...({fox: [1], owl: [2]}[words] ?? [2, 1])), more: null};
  });
  await it.start('multi');
  await eventually(it.ids, ['2', '1']);
  await it.search('f');
  await it.tick(199);
  await it.search('fox');
  await it.tick(200);
  await eventually(() => asked.length, 2);
  await it.search('owl');
  await it.tick(200);
  await eventually(it.ids, ['2']);
  const late = it.page.waitForResponse((response) => response.url().includes('words=fox'));
  give();
  await (await late).finished();
  await it.tick(0);
  assert.deepEqual([await it.ids(), asked], [['2'], ['', 'fox', 'owl']]);
});

test('older pictures come when one scrolls to their end', async (t) => {
  const it = await opened(t, ({before}) => (before === undefined ? {entries: entries(...Array(30).keys()), more: 'next'}
    : {entries: entries(30, 31), more: null}));
  await it.start('multi');
  await eventually(async () => (await it.ids()).length, 30);
  await it.tile(29);
  await it.run(() => { document.querySelector('#picker .grid').scrollTop = 100000; });
  await eventually(async () => (await it.ids()).length, 32);
  assert.equal((await it.places())[29], '1');
});

test('a dialog that has room for more than one page of pictures gets more', async (t) => {
  const it = await opened(t, ({before}) => ({entries: entries(Number(before ?? 0)), more: before === '3' ? null : String(Number(before ?? 0) + 1)}));
  await it.start('multi');
  await eventually(it.ids, ['0', '1', '2', '3']);
});

test('a lost file cannot be chosen', async (t) => {
  const it = await opened(t, () => ({entries: entries(2, 1).map((one) => ({...one, missing: one.id === '1'})), more: null}));
  await it.start('edit');
  await eventually(it.ids, ['2', '1']);
  assert.equal(await it.text('#picker .tile[data-id="1"] .lost'), 'The file is missing');
  await it.tile(1);
  assert.deepEqual([await it.pressed(), await it.isOpen()], [[], true]);
});

test('an empty history says what to do, and a studio that does not answer is told', async (t) => {
  const empty = await opened(t, all());
  await empty.start('edit');
  await eventually(empty.said, 'No picture yet: make the first one on the Generate tab.');
  const refusing = await opened(t, () => 503);
  await refusing.start('edit');
  await eventually(refusing.said, 'refused');
});
