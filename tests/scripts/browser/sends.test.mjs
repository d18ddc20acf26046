// What an event sends along that only the page knows when a button is pressed: JavaScript out of ui/*.py, which Gradio
// runs with the event's inputs and whose list it sends in their places.
import assert from 'node:assert/strict';
import test from 'node:test';

import {open, SENDS} from './page.mjs';

const GALLERY = `<div class="references"><div class="icon-button-wrapper"><button class="clear"></button></div>
  ${'<div class="gallery-item"><button class="thumbnail-item"></button></div>'.repeat(3)}</div>`;
const PAGE = `<div id="edit" class="sheet">${GALLERY}</div><div id="multi" class="sheet">${GALLERY}</div>
  <div id="gallery">${'<button class="thumbnail-lg"></button>'.repeat(3)}</div>`;

const opened = async (t) => {
  const it = await open(t, {scripts: ['compare.js', 'history.js', 'references.js'], markup: PAGE});
  return {
    ...it,
    select: (selector, index) => it.run(([wanted, place]) => {
      document.querySelectorAll(wanted).forEach((item, at) => item.classList.toggle('selected', at === place));
    }, [selector, index]),
    // Of the form "multi", where the code is for a form.
    send: (name, ...inputs) => it.run(([code, given]) => (0, eval)(code)(...given),
      [SENDS[name].replaceAll('{form}', 'multi'), inputs]),
  };
};

test('a press on references sends the clears and the picture that is selected then', async (t) => {
  const it = await opened(t);
  assert.deepEqual(await it.send('CLEARED_AND_SELECTED', 'x', 0, 'y', 'nano', []), ['0', 0, '', 'nano', []]);
  await it.select('#multi .thumbnail-item', 0);
  await it.select('#multi .thumbnail-item', 2);
  await it.click('#multi .clear');
  assert.deepEqual(await it.send('CLEARED_AND_SELECTED', 'x', 0, 'y', 'nano', []), ['1', 0, '2', 'nano', []]);
  assert.deepEqual(await it.send('SELECTED', 'x', [], 'typed'), ['2', [], 'typed']);
});

test('pictures that are added send the clears before them, and a drag where from and where to', async (t) => {
  const it = await opened(t);
  await it.click('#edit .clear');
  assert.deepEqual(await it.send('CLEARED', 'x', 0, ['file']), ['0', 0, ['file']], 'those of another form do not count');
  await it.click('#multi .clear');
  assert.deepEqual(await it.send('CLEARED', 'x', 0, ['file']), ['1', 0, ['file']]);
  await it.run(() => { window.studioReferences.moved = '2,0'; });
  assert.deepEqual(await it.send('CLEARED_AND_DRAGGED', 'x', 0, 'y', 'nano'), ['1', 0, '2,0', 'nano']);
});

test('a change of the gallery sends a clear once', async (t) => {
  const it = await opened(t);
  assert.deepEqual(await it.send('TO_CLEAR', 'x', 0, 'nano'), ['', 0, 'nano']);
  await it.click('#multi .clear');
  assert.deepEqual(await it.send('TO_CLEAR', 'x', 0, 'nano'), ['1', 0, 'nano']);
  assert.deepEqual(await it.send('TO_CLEAR', 'x', 1, 'nano'), ['', 1, 'nano']);
});

test('the picture that is picked on the stage is sent, and what Gradio knows where none is', async (t) => {
  const it = await opened(t);
  assert.deepEqual(await it.send('PICKED', 1, ['a'], 'nano'), [1, ['a'], 'nano']);
  await it.select('#gallery .thumbnail-lg', 0);
  assert.deepEqual(await it.send('PICKED', 1, ['a'], 'nano'), [0, ['a'], 'nano']);
});

test('a shape is a size at once, without the server', async (t) => {
  const it = await opened(t);
  assert.deepEqual(await it.send('SIZES', '16:9', 'nano', 128, 128), [176, 96]);
  assert.deepEqual(await it.send('SIZES', '1:1', 'nano', 176, 96), [128, 128]);
  assert.deepEqual(await it.send('SIZES', 'Free', 'nano', 200, 104), [200, 104], 'what is typed stays');
});

test('a picture to inspect is sent with its time, and one of History with its id', async (t) => {
  const it = await opened(t);
  await it.tick(1234);
  assert.deepEqual(await it.send('NOW', ['file'], 0, {}), [['file'], 1234, {}]);
  await it.run(() => { window.studioHistory.asked = '7,8'; });
  assert.deepEqual(await it.send('ASKED', 'x', 'nano'), ['7,8', 'nano']);
});
