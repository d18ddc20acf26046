// assets/page.js: keys, prompts that were run, pictures that are pasted or dropped anywhere, and Gradio's markup mended.
import assert from 'node:assert/strict';
import test from 'node:test';

import {eventually, MARKUP, open} from './page.mjs';

// As Gradio renders it: tabs, forms with a prompt and a run button, galleries with a file input, and the stage.
const TABS = ['generate', 'edit', 'multi', 'history', 'inspect'];
const form = (name, pictures = '') => `<div id="${name}" class="sheet"><div class="prompt"><textarea></textarea></div>
  ${pictures}<input class="other" type="text"><select><option>1</option></select><button class="run">Run</button></div>`;
const gallery = (kind = '') => `<div class="references ${kind}"><button class="upload-container">Drop
  <input type="file" multiple></button></div>`;
const PAGE = `<div class="gradio-container"><div id="tabs"><div role="tablist">
  ${TABS.map((name) => `<button role="tab" id="${name}-button" aria-selected="${name === 'generate'}">${name}</button>`).join('')}
  </div></div>
  ${form('generate')}${form('edit', gallery('one'))}
  ${form('multi', `${gallery()}<div class="tools"><input type="file" multiple></div>`)}
  <div id="inspect" class="sheet">${gallery('one')}</div>
  <div id="explore"><button class="upload-container" id="own-files">Files<input type="file"></button></div>
  <div class="preview"><button id="large">large</button></div><input type="search" id="search">
  <button id="look">Look</button><button id="keys">Keys</button>
  <button id="stop" style="display: none">Stop</button><button id="explore-stop" style="display: none">Stop</button>
  ${MARKUP.keys}<dialog id="another"><button>in a dialog</button></dialog></div>`;
// Tabs change as Gradio's do. What is pressed and which files are taken is written down.
const HEAR = `addEventListener('DOMContentLoaded', () => {
  window.pressed = [];
  window.taken = [];
  for (const tab of document.querySelectorAll('[role=tab]')) {
    tab.addEventListener('click', () => {
      for (const other of document.querySelectorAll('[role=tab]')) other.setAttribute('aria-selected', other === tab);
    });
  }
  for (const button of document.querySelectorAll('.run, #stop, #explore-stop')) {
    button.addEventListener('click', () => pressed.push(button.closest('.sheet')?.id ?? button.id));
  }
  document.addEventListener('change', ({target}) => {
    if (target.type !== 'file') return;
    const where = target.closest('.tools') ? 'tools' : target.closest('.sheet')?.id;
    taken.push([where, ...[...target.files].map((file) => file.name)]);
  });
});`;

const opened = async (t, options = {}) => {
  const it = await open(t, {scripts: ['page.js'], markup: PAGE, ...options, before: HEAR + (options.before ?? '')});
  await it.tick(50);  // the page is mended
  const focus = (selector) => it.run((wanted) => document.querySelector(wanted).focus(), selector);
  return {
    ...it,
    focus,
    key: it.page.keyboard,
    press: async (selector, key) => { await focus(selector); await it.page.keyboard.press(key); },
    fill: (selector, text) => it.run(([wanted, value]) => {
      const field = document.querySelector(wanted);
      field.value = value;
      field.dispatchEvent(new Event('input', {bubbles: true}));
    }, [selector, text]),
    show: (selector, on = true) => it.run(([wanted, shown]) => {
      document.querySelector(wanted).style.display = shown ? '' : 'none';
    }, [selector, on]),
    told: () => it.run(() => document.getElementById('told').textContent),
    tab: () => it.run(() => document.querySelector('[aria-selected=true]').id.replace('-button', '')),
    pressed: () => it.run(() => window.pressed.splice(0)),
    taken: () => it.run(() => window.taken.splice(0)),
    helped: () => it.run(() => document.getElementById('keys-help').open),
  };
};
const PROMPT = '#generate textarea';

// --- keys

test('Ctrl + Enter runs the form that one is in, unless it may not run', async (t) => {
  const it = await opened(t);
  await it.press(PROMPT, 'Control+Enter');
  assert.deepEqual(await it.pressed(), ['generate']);
  assert.equal(await it.run(() => document.activeElement === document.body), true, 'what was typed is sent first');
  await it.press('#multi .other', 'Control+Enter');
  assert.deepEqual(await it.pressed(), ['multi']);
  await it.press('#look', 'Control+Enter');
  await it.press(PROMPT, 'Enter');
  await it.run(() => { document.querySelector('#generate .run').disabled = true; });
  await it.press(PROMPT, 'Control+Enter');
  assert.deepEqual(await it.pressed(), []);
});

test('Escape stops the run that is seen, once', async (t) => {
  const it = await opened(t);
  await it.press(PROMPT, 'Escape');
  assert.deepEqual([await it.pressed(), await it.told()], [[], '']);
  await it.show('#explore-stop');
  await it.press(PROMPT, 'Escape');
  assert.deepEqual([await it.pressed(), await it.told()],
    [['explore-stop'], 'Stopping the run. What is finished is kept.']);
  await it.show('#stop');
  await it.key.down('Escape');
  await it.key.down('Escape');  // the key is held
  await it.key.up('Escape');
  assert.deepEqual(await it.pressed(), ['stop']);
  await it.run(() => { document.getElementById('stop').disabled = true; });
  await it.key.press('Escape');
  assert.deepEqual(await it.pressed(), []);
});

test('Escape stops nothing while it closes something', async (t) => {
  const it = await opened(t);
  await it.show('#stop');
  for (const selector of ['#generate select', '#search', '#large']) await it.press(selector, 'Escape');
  assert.deepEqual(await it.pressed(), []);
  await it.run(() => {
    const list = Object.assign(document.createElement('ul'), {id: 'list'});
    list.setAttribute('role', 'listbox');
    document.body.append(list);
    // As Gradio's dropdown: it closes its list at the same key.
    document.querySelector('#generate .other').addEventListener('keydown', () => document.getElementById('list')?.remove());
  });
  await it.press('#generate .other', 'Escape');
  assert.deepEqual(await it.pressed(), [], 'the list was open when the key came');
  await it.press('#generate .other', 'Escape');
  assert.deepEqual(await it.pressed(), ['stop']);
  await it.click('#keys');
  assert.equal(await it.helped(), true);
  await it.key.press('Escape');
  assert.deepEqual([await it.helped(), await it.pressed()], [false, []]);
});

test('a key that belongs to another is let be', async (t) => {
  const it = await opened(t);
  await it.show('#stop');
  await it.run(() => {
    const send = (how) => document.querySelector('#generate textarea').dispatchEvent(
      new KeyboardEvent('keydown', {key: 'Escape', bubbles: true, cancelable: true, ...how}));
    send({isComposing: true});  // it ends a word of a Chinese or Japanese input method
    addEventListener('keydown', (event) => event.preventDefault(), {capture: true, once: true});
  });
  assert.deepEqual(await it.pressed(), []);
});

test('the list of keys opens and closes', async (t) => {
  const it = await opened(t);
  await it.press(PROMPT, '?');
  assert.deepEqual([await it.value(PROMPT), await it.helped()], ['?', false]);
  await it.press('#look', '?');
  assert.equal(await it.helped(), true);
  await it.click('#keys-help .close');
  assert.equal(await it.helped(), false);
  await it.click('#keys');
  await it.page.mouse.click(2, 2);  // beside it
  assert.equal(await it.helped(), false);
  await it.click('#keys');
  const box = await it.page.locator('#keys-title').boundingBox();
  await it.page.mouse.click(box.x + 5, box.y + 5);
  assert.equal(await it.helped(), true, 'a click within it is none');
  await it.click('#keys-help .close');
  await it.run(() => document.getElementById('another').showModal());
  await it.key.press('?');
  assert.equal(await it.helped(), false, 'over another dialog');
});

// --- prompts that were run

const ran = async (it, form, ...texts) => {
  for (const text of texts) {
    await it.fill(`#${form} textarea`, text);
    await it.click(`#${form} .run`);
  }
};
const up = async (it, form = 'generate', key = 'Control+ArrowUp') => {
  await it.press(`#${form} textarea`, key);
  return it.value(`#${form} textarea`);
};
const down = (it, form) => up(it, form, 'Control+ArrowDown');

test('older prompts come back, each once, and the draft is not lost', async (t) => {
  const it = await opened(t);
  assert.equal(await up(it), '');
  assert.match(await it.told(), /No prompt was run here yet/);
  await ran(it, 'generate', 'a red fox', 'a blue owl', 'a red fox', '  ');
  await it.page.reload();
  await it.tick(50);
  await it.fill(PROMPT, 'half a th');
  assert.equal(await up(it), 'a red fox');
  assert.equal(await it.told(), 'Prompt 1 of 2, newest first.');
  assert.equal(await up(it), 'a blue owl');
  assert.equal(await up(it), 'a blue owl');
  assert.match(await it.told(), /oldest/);
  assert.deepEqual([await down(it), await down(it)], ['a red fox', 'half a th']);
  assert.equal(await it.told(), 'This is what you were writing.');
  assert.equal(await down(it), 'half a th');
});

test('a prompt that was changed on the way is not lost, and a run begins anew', async (t) => {
  const it = await opened(t);
  await ran(it, 'generate', 'old', 'new');
  await it.fill(PROMPT, 'draft');
  assert.equal(await up(it), 'new');
  await it.fill(PROMPT, 'new, in the snow');
  assert.equal(await up(it), 'new');
  assert.equal(await down(it), 'new, in the snow');
  assert.equal(await down(it), 'draft');
  await it.key.press('Control+Enter');
  assert.deepEqual([await up(it), await up(it)], ['new', 'old'], 'what runs is what is written');
  assert.deepEqual([await down(it), await down(it)], ['new', 'draft']);
});

test('what comes into the field is typed as far as Gradio knows, with the cursor at its end', async (t) => {
  const it = await opened(t);
  await ran(it, 'generate', 'a fox');
  await it.fill(PROMPT, '');
  await it.run(() => {
    window.heard = [];
    document.querySelector('#generate textarea').addEventListener('input', ({target}) => window.heard.push(target.value));
  });
  await up(it);
  assert.deepEqual(await it.run(() => window.heard), ['a fox']);
  assert.equal(await it.run(() => document.activeElement.selectionStart), 5);
  assert.equal(await up(it, 'generate', 'Alt+ArrowDown'), '', 'Option + an arrow on a Mac');
  await it.press(PROMPT, 'ArrowUp');
  assert.equal(await it.value(PROMPT), '', 'an arrow alone moves the cursor');
});

test('each form has prompts of its own, and all can be forgotten', async (t) => {
  const it = await opened(t);
  await ran(it, 'generate', 'a fox');
  await ran(it, 'edit', 'paint it blue');
  await it.fill('#multi textarea', '');
  assert.equal(await up(it, 'multi'), '');
  await it.fill('#edit textarea', '');
  assert.equal(await up(it, 'edit'), 'paint it blue');
  await it.click('#keys');
  await it.click('#keys-help .forget');
  assert.deepEqual([await it.helped(), await it.told()], [false, 'The prompts were forgotten.']);
  for (const name of ['generate', 'edit']) {
    await it.fill(`#${name} textarea`, '');
    assert.equal(await up(it, name), '');
  }
  assert.match(await it.told(), /No prompt was run here yet/);
});

test('fifty prompts are kept, and not too many characters', async (t) => {
  const it = await opened(t);
  await it.run(() => {
    for (let number = 0; number < 60; number += 1) {
      document.querySelector('#generate textarea').value = `prompt ${number}`;
      document.querySelector('#generate .run').click();
    }
  });
  const kept = () => it.run(() => JSON.parse(localStorage['flux2-studio.prompts.generate']));
  assert.deepEqual([(await kept()).length, (await kept())[0], (await kept())[49]], [50, 'prompt 59', 'prompt 10']);
  await ran(it, 'generate', 'x'.repeat(99995));
  assert.deepEqual((await kept()).map((text) => text.length), [99995]);
});

test('a browser that keeps nothing, or rubbish, still has the prompts of this page', async (t) => {
  const it = await opened(t, {before: `
    localStorage['flux2-studio.prompts.edit'] = '{"not": "a list"}';
    localStorage['flux2-studio.prompts.multi'] = '["a fox", 3, null]';
    Storage.prototype.setItem = () => { throw new Error('full'); };`});
  assert.equal(await up(it, 'edit'), '');
  assert.equal(await up(it, 'multi'), 'a fox');
  await it.run(() => { Storage.prototype.getItem = () => { throw new Error('private'); }; });
  await ran(it, 'generate', 'an owl');
  await it.fill(PROMPT, '');
  assert.equal(await up(it), 'an owl');
});

// --- pictures that are pasted or dropped

// Pastes or drops files of [name, type] at `selector`. Returns whether the page left it to the browser.
const give = (it, event, files, selector = 'body', text = '') => it.run(([kind, given, where, words]) => {
  const carrier = new DataTransfer();
  for (const [name, type] of given) carrier.items.add(new File(['words'], name, {type}));
  if (words) carrier.setData('text/plain', words);
  const carried = {clipboardData: carrier, dataTransfer: carrier, bubbles: true, cancelable: true};
  const made = new (kind === 'paste' ? ClipboardEvent : DragEvent)(kind, carried);
  return document.querySelector(where).dispatchEvent(made);
}, [event, files, selector, text]);
const picture = (name) => [name, 'image/png'];

test('a picture lands in the form that one is in, or is one to edit', async (t) => {
  const it = await opened(t);
  for (const event of ['paste', 'drop']) {
    for (const [from, to, told] of [
      ['generate', 'edit', 'Sent to Edit, as the picture to edit.'], ['history', 'edit', 'Sent to Edit, as the picture to edit.'],
      ['edit', 'edit', 'Sent to Edit, as the picture to edit.'], ['multi', 'multi', 'Sent to Multi-reference, after the others.'],
      ['inspect', 'inspect', 'Sent to Inspect.'],
    ]) {
      await it.click(`#${from}-button`);
      assert.equal(await give(it, event, [picture('fox.png')]), false);
      await eventually(() => it.run(() => window.taken.length), 1);
      assert.deepEqual([await it.taken(), await it.tab()], [[[to, 'fox.png']], to], `${event} on ${from}`);
      assert.equal((await it.told()).trim(), told);
    }
  }
});

test('with a picture selected in the gallery the button beside it takes the file', async (t) => {
  const it = await opened(t);
  await it.click('#multi-button');
  await it.run(() => document.querySelector('#multi .references input').remove());
  await give(it, 'paste', [picture('fox.png')]);
  assert.deepEqual(await it.taken(), [['tools', 'fox.png']]);
});

test('a tab that was never opened is waited for', async (t) => {
  const it = await opened(t);
  await it.run(() => {
    window.kept = document.querySelector('#edit .references');
    window.kept.remove();
  });
  await give(it, 'drop', [picture('fox.png')]);
  assert.equal(await it.tab(), 'edit');
  await it.tick(10000);
  assert.deepEqual(await it.taken(), []);
  await it.run(() => document.getElementById('edit').append(window.kept));
  await it.tick(50);
  assert.deepEqual(await it.taken(), [['edit', 'fox.png']]);
});

test('a form that takes nothing for long is busy', async (t) => {
  const it = await opened(t);
  await it.click('#edit-button');
  await it.run(() => document.querySelector('#edit .references input').remove());
  await give(it, 'drop', [picture('fox.png')]);
  await it.tick(5100);
  assert.match(await it.told(), /The last picture is still on its way/);
});

test('what is no picture is told', async (t) => {
  const it = await opened(t);
  await give(it, 'drop', [['notes.pdf', 'application/pdf'], ['notes.txt', 'text/plain']]);
  assert.match(await it.told(), /^notes.pdf, notes.txt is no picture/);
  await give(it, 'paste', []);
  assert.match(await it.told(), /^There is no picture in the clipboard/);
  assert.deepEqual([await it.taken(), await it.tab()], [[], 'generate']);
  await give(it, 'paste', [['unnamed', 'image/webp'], ['notes.txt', 'text/plain'], ['PHOTO.JPEG', '']]);
  assert.match(await it.told(), /Edit takes one picture: unnamed.*notes.txt was left out/);
  assert.deepEqual(await it.taken(), [['edit', 'unnamed']]);
});

test('one picture too many is told, and several join the references', async (t) => {
  const it = await opened(t);
  const two = [picture('first.png'), picture('second.png')];
  await it.click('#inspect-button');
  await give(it, 'drop', two);
  assert.match(await it.told(), /^Inspect looks at one picture at a time: first.png/);
  await it.click('#edit-button');
  await give(it, 'drop', two);
  assert.match(await it.told(), /^Edit takes one picture: first.png. Multi-reference/);
  await it.click('#multi-button');
  await give(it, 'drop', two);
  assert.deepEqual(await it.taken(), [['inspect', 'first.png'], ['edit', 'first.png'], ['multi', 'first.png', 'second.png']]);
});

test('text is pasted where one writes, and a picture everywhere', async (t) => {
  const it = await opened(t);
  assert.equal(await give(it, 'paste', [picture('table.png')], PROMPT, 'a fox'), true, 'words with a picture of them');
  assert.equal(await give(it, 'paste', [], PROMPT, 'a fox'), true);
  assert.equal(await give(it, 'paste', [], PROMPT), true);
  assert.deepEqual([await it.taken(), await it.told()], [[], '']);
  assert.equal(await give(it, 'paste', [picture('fox.png')], PROMPT), false);
  assert.deepEqual(await it.taken(), [['edit', 'fox.png']]);
});

test('an open dialog, and what takes files of its own, keep what is given to them', async (t) => {
  const it = await opened(t);
  assert.equal(await give(it, 'drop', [picture('fox.png')], '#own-files'), true);
  assert.equal(await give(it, 'dragover', [picture('fox.png')], '#own-files'), true);
  await it.run(() => document.getElementById('another').showModal());
  for (const event of ['paste', 'drop', 'dragover']) {
    assert.equal(await give(it, event, [picture('fox.png')], '#another button'), true, event);
  }
  assert.deepEqual([await it.taken(), await it.told()], [[], '']);
});

test('a file over the page is told where it will go', async (t) => {
  const it = await opened(t);
  assert.equal(await give(it, 'dragover', [picture('fox.png')]), false);
  assert.equal(await it.told(), 'Drop it anywhere: it becomes the picture to edit.');
  await it.click('#multi-button');
  await give(it, 'dragover', [picture('fox.png')]);
  assert.equal(await it.told(), 'Drop it anywhere: it joins the references.');
  await give(it, 'dragover', [], 'body', 'words');
  await it.tick(12000);
  assert.equal(await it.told(), '', 'it is not told for ever');
});

test('a drop is heard before Gradio hears it, whose mark is taken off', async (t) => {
  const it = await opened(t);
  await it.click('#edit-button');
  await it.run(() => {
    window.heard = [];
    const zone = document.querySelector('#edit .upload-container');
    for (const event of ['drop', 'dragleave']) zone.addEventListener(event, () => window.heard.push(event));
  });
  await give(it, 'drop', [picture('fox.png')], '#edit .upload-container');
  assert.deepEqual([await it.run(() => window.heard), await it.taken()], [['dragleave'], [['edit', 'fox.png']]]);
});

test('a picture of the page that slips is not taken, but one that is put onto references', async (t) => {
  const it = await opened(t);
  await it.click('#multi-button');
  const drag = (name) => it.run((kind) => document.body.dispatchEvent(new DragEvent(kind, {bubbles: true})), name);
  await drag('dragstart');
  assert.equal(await give(it, 'dragover', [picture('own.png')]), true);
  assert.equal(await give(it, 'drop', [picture('own.png')]), true);
  assert.deepEqual(await it.taken(), []);
  await give(it, 'drop', [picture('own.png')], '#multi .references');
  assert.deepEqual(await it.taken(), [['multi', 'own.png']]);
  await drag('dragend');
  await give(it, 'drop', [picture('other.png')]);
  assert.deepEqual(await it.taken(), [['multi', 'other.png']]);
});

// --- telling, and Gradio's markup

test('a sentence stays for twelve seconds, and a later one as long', async (t) => {
  const it = await opened(t);
  const say = (text) => it.run((words) => window.studioPage.say(words), text);
  await say('one');
  await it.tick(11000);
  await say('two');
  await it.tick(11999);
  assert.equal(await it.told(), 'two');
  assert.equal(await it.run(() => document.getElementById('told').getAttribute('role')), 'status');
  await it.tick(1);
  assert.equal(await it.run(() => document.getElementById('told').hidden), true);
});

test('the bar that tells comes back where Gradio draws the page anew', async (t) => {
  const it = await opened(t);
  await it.run(() => document.getElementById('told').remove());
  await it.tick(50);
  assert.equal(await it.run(() => document.getElementById('told').parentElement.className), 'gradio-container');
});

test('the markup of Gradio is mended, whenever it is drawn', async (t) => {
  const it = await opened(t);
  await it.run(() => document.querySelector('.gradio-container').insertAdjacentHTML('beforeend',
    '<div class="toast-header" role="button">!</div><div class="cm-scroller"></div>'
    + '<div class="references one"><input type="file" multiple id="one"></div>'));
  await it.tick(50);
  assert.deepEqual(await it.run(() => [
    document.querySelector('.toast-header').getAttribute('role'), document.querySelector('.cm-scroller').tabIndex,
    document.querySelector('.cm-scroller').getAttribute('aria-label'), document.getElementById('one').multiple,
    document.querySelector('#multi .references input').multiple,
  ]), ['group', 0, 'Code; the arrow keys scroll it', false, true]);
});

test('a button within a button opens the files by the outer one', async (t) => {
  const it = await opened(t);
  await it.run(() => {
    window.opened = 0;
    // Only by script can a button be put into another one.
    const [outer, inner] = ['button', 'button'].map((name) => document.createElement(name));
    outer.id = 'outer';
    inner.className = 'upload-container';
    inner.addEventListener('click', (event) => { event.stopPropagation(); window.opened += 1; });
    outer.append(inner);
    document.querySelector('#edit .references').append(outer);
  });
  await it.tick(50);
  assert.equal(await it.run(() => document.querySelector('#outer button').inert), true);
  await it.press('#outer', 'Enter');
  assert.equal(await it.run(() => window.opened), 1);
});

test('the look changes between light and dark', async (t) => {
  const it = await opened(t);
  const dark = () => it.run(() => document.body.classList.contains('dark'));
  await it.click('#look');
  assert.equal(await dark(), true);
  await it.click('#look');
  assert.equal(await dark(), false);
});
