// assets/language.js: the page's words where Gradio does not translate them.
import assert from 'node:assert/strict';
import test from 'node:test';

import {eventually, open} from './page.mjs';

const GERMAN = {
  'Close': 'Schließen', 'Keys': 'Tasten', '{count} of {all}': '{all}, davon {count}', 'Cost: $1': 'Kosten: $& $1',
  'Press {0} or {1}.': '{1} oder {0} drücken.', 'Words of the prompt': 'Wörter des Prompts', 'Find': 'Finden',
  'Keep {this}': '{this} {that}',
};
const table = (said) => Object.fromEntries(Object.entries(said).map(([key, text]) => [`flux2-studio: ${key}`, text]));
const TABLES = {en: {}, de: table(GERMAN), 'zh-CN': table({Close: '关闭'})};
// In a browser that prefers the language `locale`.
const opened = (t, locale, markup = '', tables = TABLES) => open(t, {
  scripts: [], markup, before: `Object.defineProperty(navigator, 'language', {value: '${locale}'});
    ${tables ? `window.gradio_config = {i18n_translations: ${JSON.stringify(tables)}};` : ''}`,
});
const say = (it, ...given) => it.run((them) => window.studioSay(...them), given);
const language = (it) => it.run(() => document.documentElement.lang);

test('a text is said in the language of the reader, and in English where there is none', async (t) => {
  for (const [locale, said, lang] of [
    ['de-AT', 'Schließen', 'de'], ['zh-CN', '关闭', 'zh-CN'], ['zh-TW', 'Close', 'en'], ['fr-FR', 'Close', 'en'],
    ['en-GB', 'Close', 'en'],
  ]) {
    const it = await opened(t, locale);
    assert.equal(await say(it, 'Close'), said, locale);
    await it.run(() => document.body.append('something'));
    await eventually(() => language(it), lang);
  }
});

test('a text without a translation, and a page without a catalogue, stay English', async (t) => {
  const it = await opened(t, 'de-DE');
  assert.equal(await say(it, 'No such {thing}', {thing: 'text'}), 'No such text');
  assert.equal(await say(await opened(t, 'de-DE', '', null), 'Close'), 'Close');
});

test('placeholders are filled once, with whatever the values hold', async (t) => {
  const it = await opened(t, 'de-DE');
  assert.equal(await say(it, '{count} of {all}', {count: 0, all: '{count} $&'}), '{count} $&, davon 0');
  assert.equal(await say(it, 'Keep {this}', {this: 'that'}), 'that {that}', 'what has no value stays');
  assert.equal(await say(it, '{toString}'), '{toString}');
});

test('marked markup is translated, and nothing else', async (t) => {
  const it = await opened(t, 'de-DE', '');
  await it.run(() => {
    document.body.innerHTML = '<p data-i18n>\n Keys  </p><p id="other">Keys</p><p data-i18n id="cost">Cost: $1</p>'
      + '<input data-i18n placeholder="Words of the prompt" aria-label="Find" title="No such text">';
  });
  await eventually(() => it.run(() => document.querySelector('[data-i18n]').textContent), '\n Tasten  ');
  assert.equal(await it.text('#other'), 'Keys');
  assert.equal(await it.text('#cost'), 'Kosten: $& $1');
  assert.deepEqual(await it.run(() => ['placeholder', 'aria-label', 'title']
    .map((name) => document.querySelector('input').getAttribute(name))), ['Wörter des Prompts', 'Finden', 'No such text']);
});

test('a sentence keeps its elements, in the order of the language', async (t) => {
  const it = await opened(t, 'de-DE', '');
  await it.run(() => {
    const [paragraph, key] = ['p', 'kbd'].map((name) => document.createElement(name));
    paragraph.dataset.i18n = '';
    key.textContent = 'Esc';
    key.addEventListener('click', () => { window.pressed = true; });
    paragraph.append('Press ', key, ' or\n ', Object.assign(document.createElement('b'), {textContent: 'X'}), '.');
    document.body.append(paragraph);
  });
  await eventually(() => it.text('p'), 'X oder Esc drücken.');
  await it.click('kbd');
  assert.equal(await it.run(() => window.pressed), true, 'it is the same element');
});

test('what changes later is translated, too', async (t) => {
  const it = await opened(t, 'de-DE', '<p data-i18n>Keys</p>');
  await eventually(() => it.text('p'), 'Tasten');
  await it.run(() => { document.querySelector('p').firstChild.data = 'Close'; });
  await eventually(() => it.text('p'), 'Schließen');
});

test('a text that comes later than its element is translated', async (t) => {
  const it = await opened(t, 'de-DE', '<p data-i18n></p><p id="other"></p>');
  await it.tick(0);  // the element has been seen without it
  await it.run(() => document.querySelectorAll('p').forEach((paragraph) => paragraph.append('Keys')));
  await eventually(() => it.text('p'), 'Tasten');
  assert.equal(await it.text('#other'), 'Keys');
});

test('the page is in the language that it speaks, whatever Gradio writes', async (t) => {
  const it = await opened(t, 'fr-FR', '<p data-i18n>Keys</p>');
  await it.run(() => { document.documentElement.lang = 'fr'; });
  await eventually(() => language(it), 'en');
  assert.equal(await it.text('p'), 'Keys');
});
