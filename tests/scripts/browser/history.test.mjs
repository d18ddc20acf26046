// assets/history.js: the grid of pictures, one of them large, and changes; whatever the order in which answers come.
import assert from 'node:assert/strict';
import test from 'node:test';

import {eventually, later, MARKUP, open, PIXEL} from './page.mjs';

const STYLE = `body { margin: 0; } .grid { display: grid; grid-template-columns: repeat(4, 150px); }
  .tile { height: 150px; position: relative; overflow: hidden; } .more { height: 1px; } [hidden] { display: none !important; }
  .viewer figure { width: 200px; height: 100px; margin: 0; } .viewer img { width: 50px; height: 50px; }`;
const BUTTONS = ['edit', 'multi', 'reuse', 'again', 'vary'].map((name) => `<button id="history-${name}"></button>`).join('');
const PAGE = `<div id="elsewhere" hidden></div><div id="history-root">${MARKUP.history}</div>${BUTTONS}
  <div id="generate" class="sheet"><button class="run">Run</button></div>`;
// What is pressed of the hidden buttons, and with which picture. Downloads are written down, not made.
const HEAR = `addEventListener('DOMContentLoaded', () => {
  window.pressed = [];
  for (const button of document.querySelectorAll('[id^=history-]:is(button), .run')) {
    button.addEventListener('click', () => pressed.push([button.id || 'run', studioHistory.asked]));
  }
  addEventListener('click', (event) => {
    const link = event.target.closest('a[href*="zip"]');
    if (link) { event.preventDefault(); pressed.push(['zip', new URL(link.href).search]); }
  });
});`;

const entry = (id, more = {}) => ({
  id: String(id), prompt: `picture ${id}`, created: 1700000000000 + Number(id), favourite: false, missing: false, ...more,
});
const entries = (...ids) => ids.map((id) => entry(id));
const details = (one) => ({...one, rows: [['Seed', one.id]], madeFrom: [], madeInto: [], before: null});

// A studio with these pictures, newest first, `size` of them in a page.
class Studio {
  constructor(pictures, size = 100) {
    Object.assign(this, {pictures, size, trashed: [], hold: null});
  }

  answer = async (asked) => {
    const said = structuredClone(this.say(asked));  // as it is now
    const {hold} = this;
    if (hold?.(asked)) await hold.until;
    return said;
  };

  // Holds what the server says to the next request like `wanted`; returns what lets it through.
  held(wanted) {
    const {answer, give} = later();
    let taken = false;
    this.hold = Object.assign((asked) => !taken && wanted(asked) && (taken = true), {until: answer});
    return give;
  }

  say({path, query, body}) {
    const [name, id] = path.replace('/history/', '').split('/');
    const found = this.pictures.filter((one) => one.prompt.includes(query.words ?? '')
      && (!query.favourites || one.favourite));
    const find = () => this.pictures.find((one) => one.id === id);
    const named = (ids) => this.pictures.filter((one) => ids.includes(one.id));
    switch (name) {
      case 'page': {
        const start = query.before ? found.findIndex((one) => one.id === query.before) + 1 : 0;
        const shown = found.slice(start, start + this.size);
        const more = start + this.size < found.length ? shown.at(-1).id : null;
        const all = {count: found.length, all: this.pictures.length, checkpoints: [{name: 'nano', label: 'Nano'}],
          trashed: this.trashed.map((one) => one.id)};
        return {entries: shown, more, ...(query.before ? {} : all)};
      }
      case 'entry': return find() ? details(find()) : 404;
      case 'favourite': named(body.ids).forEach((one) => { one.favourite = body.on; }); return {};
      case 'delete': {
        const gone = named(body.ids);
        this.pictures = this.pictures.filter((one) => !gone.includes(one));
        this.trashed.push(...gone);
        return {ids: gone.map((one) => one.id)};
      }
      case 'restore': {
        const back = this.trashed.filter((one) => body.ids.includes(one.id));
        this.trashed = this.trashed.filter((one) => !back.includes(one));
        this.pictures = [...this.pictures, ...back].sort((a, b) => b.created - a.created);
        return {ids: back.map((one) => one.id)};
      }
      case 'empty': this.trashed = []; return {};
      default: return PIXEL;
    }
  }
}

const opened = async (t, studio, options = {}) => {
  const it = await open(t, {
    scripts: ['compare.js', 'history.js'], markup: PAGE, style: STYLE, before: HEAR, answer: studio.answer, ...options,
  });
  const ids = () => it.run(() => [...document.querySelectorAll('.tile')].map((tile) => tile.dataset.id));
  const of = (id, part) => `.tile[data-id="${id}"] ${part}`;
  if (!options.unfilled) {
    await eventually(ids, studio.say({path: '/history/page', query: {}}).entries.map((one) => one.id));
  }
  return {
    ...it,
    ids,
    of,
    key: it.page.keyboard,
    picked: () => it.run(() => [...document.querySelectorAll('.pick:checked')].map((box) => box.closest('.tile').dataset.id)),
    count: () => it.text('.count'),
    told: () => it.run(() => (document.querySelector('.told').hidden ? '' : document.querySelector('.told span').textContent)),
    shown: () => it.run(() => (document.querySelector('.viewer').open ? document.querySelector('.prompt-text').textContent : '')),
    pages: () => it.asked.filter(({path}) => path === '/history/page').length,
    act: (name) => it.click(`.viewer [data-do=${name}]`),
    search: (words) => it.run((text) => {
      const field = document.querySelector('.filters').elements.words;
      field.value = text;
      field.dispatchEvent(new Event('input', {bubbles: true}));
    }, words),
    pressed: () => it.run(() => window.pressed.splice(0)),
  };
};
const asks = (name) => ({path}) => path.startsWith(`/history/${name}`);

// --- the grid

test('a search is asked once one stops typing, and an older answer is not shown', async (t) => {
  const studio = new Studio([entry(3, {prompt: 'fox'}), entry(2, {prompt: 'owl'}), entry(1, {prompt: 'old fox'})]);
  const it = await opened(t, studio);
  const before = it.pages();
  await it.search('f');
  await it.tick(199);
  await it.search('fox');
  await it.tick(199);
  assert.equal(it.pages(), before);
  const release = studio.held(asks('page'));
  await it.tick(1);
  await eventually(() => it.pages(), before + 1);
  await it.search('owl');
  await it.tick(200);
  await eventually(it.ids, ['2']);
  assert.equal(await it.count(), '1 of 3 pictures');
  release();
  await it.search('');
  await it.tick(200);
  await eventually(it.ids, ['3', '2', '1']);
});

test('an answer that comes when a later one was shown already changes nothing', async (t) => {
  const studio = new Studio([entry(2, {prompt: 'fox'}), entry(1, {prompt: 'owl'})]);
  const it = await opened(t, studio);
  const release = studio.held(asks('page'));
  await it.search('fox');
  await it.tick(200);
  await it.search('owl');
  await it.tick(200);
  await eventually(it.ids, ['1']);
  const late = it.page.waitForResponse((response) => response.url().includes('words=fox'));
  release();
  await (await late).finished();
  await it.tick(0);
  assert.deepEqual(await it.ids(), ['1']);
});

test('new pictures come to the top and lost ones go, and the selection stays', async (t) => {
  const studio = new Studio(entries(5, 4, 3, 2));
  const it = await opened(t, studio);
  await it.click(it.of(4, '.pick'));
  await it.click(it.of(3, '.pick'));
  studio.pictures = [entry(6), entry(5, {favourite: true}), entry(3), entry(2, {missing: true})];
  await it.tick(5000);
  await eventually(it.ids, ['6', '5', '3', '2']);
  assert.deepEqual([await it.picked(), await it.count()], [['3'], '1 selected']);
  assert.equal(await it.page.locator(it.of(5, '.heart')).getAttribute('aria-pressed'), 'true');
  assert.equal(await it.text(it.of(2, '.lost')), 'The file is missing');
});

test('a list that was asked for before a change is not shown', async (t) => {
  const studio = new Studio(entries(2, 1));
  const it = await opened(t, studio);
  const release = studio.held(asks('page'));
  const before = it.pages();
  await it.tick(5000);
  await eventually(() => it.pages(), before + 1);
  await it.click(it.of(2, '.heart'));
  await eventually(() => it.page.locator(it.of(2, '.heart')).getAttribute('aria-pressed'), 'true');
  const late = it.page.waitForResponse((response) => response.url().includes('/page'));
  release();
  await (await late).finished();
  await it.tick(0);
  assert.equal(await it.page.locator(it.of(2, '.heart')).getAttribute('aria-pressed'), 'true');
});

test('a tab that is not seen asks for nothing', async (t) => {
  const it = await opened(t, new Studio(entries(1)));
  await it.run(() => { document.getElementById('history-root').style.display = 'none'; });
  const before = it.pages();
  await it.tick(20000);
  assert.equal(it.pages(), before);
});

test('older pictures come when one scrolls to their end, each once', async (t) => {
  const studio = new Studio(entries(...Array.from({length: 90}, (_, number) => 90 - number)), 60);
  const it = await opened(t, studio);
  assert.equal((await it.ids()).length, 60);
  studio.pictures.unshift(entry(91));  // made meanwhile
  await it.run(() => scrollTo(0, document.body.scrollHeight));
  await eventually(async () => (await it.ids()).length, 90);
  assert.equal(new Set(await it.ids()).size, 90);
});

test('while a search is on its way, scrolling asks for no older pictures of the list before it', async (t) => {
  const studio = new Studio(entries(...Array.from({length: 90}, (_, number) => 90 - number)), 60);
  const it = await opened(t, studio);
  const release = studio.held(asks('page'));
  await it.search('picture 1');
  await it.tick(200);
  await eventually(() => it.asked.at(-1).query.words, 'picture 1');
  await it.run(() => scrollTo(0, document.body.scrollHeight));
  await it.run(() => new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))));
  release();
  await eventually(async () => (await it.ids()).length, 11);
  assert.deepEqual(it.asked.filter(({query}) => query.before), []);
});

test('a screen that has room for more than one page of pictures gets more', async (t) => {
  const studio = new Studio(entries(...Array.from({length: 20}, (_, number) => 20 - number)), 4);
  const it = await opened(t, studio, {unfilled: true});
  await eventually(async () => (await it.ids()).length, 20);
  studio.pictures = entries(...Array.from({length: 40}, (_, number) => 40 - number))
    .map((one) => ({...one, prompt: Number(one.id) % 2 ? 'odd' : 'even'}));
  await it.search('odd');
  await it.tick(200);
  await eventually(async () => (await it.ids()).length, 20);
});

test('what is wrong with the studio is told', async (t) => {
  const studio = new Studio(entries(2, 1));
  const it = await opened(t, studio);
  studio.say = () => 503;
  await it.click(it.of(2, '.heart'));
  await eventually(it.told, 'refused');
  await it.page.route('**/history/favourite', (route) => route.abort());
  await it.click(it.of(1, '.heart'));
  await eventually(it.told, 'The studio does not answer: see whether it still runs.');
  await it.page.unroute('**/history/favourite');
});

test('texts of users only ever become text', async (t) => {
  const prompt = '<img src=x onerror="window.hacked=1"> & "quotes"';
  const it = await opened(t, new Studio([entry(1, {prompt})]));
  assert.ok((await it.page.locator(it.of(1, '.open')).getAttribute('aria-label')).includes(prompt));
  await it.click(it.of(1, '.open'));
  await eventually(it.shown, prompt);
  assert.equal(await it.run(() => window.hacked), undefined);
});

test('a history without pictures says what to do, and one where nothing matches says so', async (t) => {
  const empty = await opened(t, new Studio([]));
  await eventually(() => empty.run(() => document.querySelector('.filters').hidden), true);
  assert.match(await empty.text('.nothing'), /Make the first one on the Generate tab/);
  const it = await opened(t, new Studio(entries(1)));
  await it.search('nothing like this');
  await it.tick(200);
  await eventually(it.ids, []);
  assert.match(await it.text('.nothing'), /^Nothing matches/);
  assert.equal(await it.seen('.filters'), true);
});

// --- a selection

test('with Shift all from the last pick to this one are picked, or taken back', async (t) => {
  const it = await opened(t, new Studio(entries(5, 4, 3, 2, 1)));
  const shift = {shiftKey: true};
  await it.click(it.of(4, '.pick'));
  assert.deepEqual([await it.picked(), await it.count()], [['4'], '1 selected']);
  await it.click(it.of(1, '.pick'), shift);
  assert.deepEqual([await it.picked(), await it.count()], [['4', '3', '2', '1'], '4 selected']);
  await it.click(it.of(3, '.pick'), shift);
  assert.deepEqual(await it.picked(), ['4'], 'taken back, from the one that was picked last');
  await it.click(it.of(5, '.open'), shift);
  assert.deepEqual(await it.picked(), ['5', '4', '3'], 'upwards, too');
  assert.equal(await it.shown(), '');
  await it.click(it.of(2, '.pick'));
  assert.deepEqual(await it.picked(), ['5', '4', '3', '2'], 'without Shift it is this one alone');
});

test('a range begins anew where the last pick is gone', async (t) => {
  const studio = new Studio(entries(4, 3, 2, 1));
  const it = await opened(t, studio);
  await it.click(it.of(4, '.pick'));
  studio.pictures = entries(3, 2, 1);
  await it.tick(5000);
  await eventually(it.ids, ['3', '2', '1']);
  await it.click(it.of(1, '.pick'), {shiftKey: true});
  assert.deepEqual(await it.picked(), ['1']);
});

test('all are selected, and none, and the selection is downloaded', async (t) => {
  const it = await opened(t, new Studio(entries(3, 2, 1)));
  assert.equal(await it.seen('.picked'), false);
  await it.click(it.of(2, '.pick'));
  assert.equal(await it.seen('.picked'), true);
  await it.click('[data-do=zip]');
  await it.click('[data-do=all]');
  assert.deepEqual(await it.picked(), ['3', '2', '1']);
  await it.click('[data-do=zip]');
  const zips = (await it.pressed()).map(([, query]) => new URLSearchParams(query).get('ids').split(',').sort());
  assert.deepEqual(zips, [['2'], ['1', '2', '3']]);
  await it.click('[data-do=none]');
  assert.deepEqual([await it.picked(), await it.count()], [[], '3 pictures']);
});

test('at most two hundred are selected, downloaded and deleted at once', async (t) => {
  const studio = new Studio(entries(...Array.from({length: 205}, (_, number) => 205 - number)), 300);
  const it = await opened(t, studio);
  await it.click(it.of(205, '.pick'));
  await it.click('[data-do=all]');
  assert.equal((await it.picked()).length, 200);
  await it.click(it.of(1, '.pick'));
  await it.click('[data-do=zip]');
  assert.deepEqual(await it.pressed(), []);
  assert.equal(await it.told(), 'Choose at most 200 pictures to download at once.');
  await it.click('[data-do=delete]');
  await eventually(async () => (await it.ids()).length, 5);
  assert.deepEqual([await it.picked(), await it.count()], [['1'], '1 selected']);
});

test('what was deleted comes back by Undo, and later from the trash', async (t) => {
  const it = await opened(t, new Studio(entries(3, 2, 1)));
  await it.click(it.of(3, '.pick'));
  await it.click(it.of(1, '.pick'));
  await it.click('.picked [data-do=delete]');
  await eventually(it.ids, ['2']);
  assert.deepEqual([await it.told(), await it.count()], ['2 pictures were deleted.', '1 picture']);
  assert.equal(await it.run(() => document.activeElement.dataset.do), 'undo');
  assert.match(await it.text('.trash'), /^2 deleted pictures are kept for a day/);
  await it.click('[data-do=undo]');
  await eventually(it.ids, ['3', '2', '1']);
  await eventually(it.told, '2 pictures are back.');
  await it.click(it.of(2, '.pick'));
  await it.click('.picked [data-do=delete]');
  await eventually(it.ids, ['3', '1']);
  await it.tick(30000);
  assert.equal(await it.told(), '', 'Undo is not offered for ever');
  await it.click('[data-do=back]');
  await eventually(it.ids, ['3', '2', '1']);
  assert.equal(await it.seen('.trash'), false);
});

test('the trash is emptied at the second press', async (t) => {
  const studio = new Studio(entries(2, 1));
  const it = await opened(t, studio);
  await it.click(it.of(2, '.pick'));
  await it.click('.picked [data-do=delete]');
  await eventually(it.ids, ['1']);
  await it.click('[data-do=empty]');
  assert.deepEqual([await it.text('[data-do=empty]'), studio.trashed.length], ['Really remove?', 1]);
  await it.click('[data-do=empty]');
  await eventually(() => it.seen('.trash'), false);
  assert.deepEqual([studio.trashed.length, await it.told()], [0, 'The deleted pictures are gone for good.']);
});

// --- one picture

test('the newest that was opened is shown, whichever is answered first', async (t) => {
  const studio = new Studio(entries(2, 1));
  const it = await opened(t, studio);
  const release = studio.held(asks('entry/2'));
  await it.click(it.of(2, '.open'));
  await it.click(it.of(1, '.open'));
  await eventually(it.shown, 'picture 1');
  const late = it.page.waitForResponse((response) => response.url().endsWith('entry/2'));
  release();
  await (await late).finished();
  await it.tick(0);
  assert.equal(await it.shown(), 'picture 1');
});

test('keys turn the pages as far as there are some, and the focus comes back', async (t) => {
  const it = await opened(t, new Studio(entries(3, 2, 1)));
  await it.page.locator(it.of(3, '.open')).focus();
  await it.click(it.of(3, '.open'));
  await eventually(it.shown, 'picture 3');
  const may = (name) => it.run((act) => !document.querySelector(`.viewer [data-do=${act}]`).disabled, name);
  assert.deepEqual([await may('newer'), await may('older')], [false, true]);
  await it.key.press('ArrowLeft');
  await it.key.press('ArrowRight');
  await eventually(it.shown, 'picture 2');
  await it.key.press('ArrowRight');
  await eventually(it.shown, 'picture 1');
  assert.deepEqual([await may('newer'), await may('older')], [true, false]);
  await it.key.press('Control+ArrowLeft');
  await it.key.press('ArrowLeft');
  await eventually(it.shown, 'picture 2');
  await it.key.press('Escape');
  await eventually(it.shown, '');
  await eventually(() => it.run(() => document.activeElement.closest('.tile')?.dataset.id), '2');
});

test('a picture that is closed while it loads does not open', async (t) => {
  const studio = new Studio(entries(2, 1));
  const it = await opened(t, studio);
  await it.click(it.of(1, '.open'));
  await eventually(it.shown, 'picture 1');
  const release = studio.held(asks('entry/2'));
  await it.act('newer');
  await it.act('close');
  await eventually(it.shown, '');
  const late = it.page.waitForResponse((response) => response.url().endsWith('entry/2'));
  release();
  await (await late).finished();
  await it.tick(0);
  assert.equal(await it.shown(), '');
});

test('paging reaches pictures that the grid does not show yet', async (t) => {
  const studio = new Studio(entries(...Array.from({length: 62}, (_, number) => 62 - number)), 60);
  const it = await opened(t, studio);
  await it.click(it.of(3, '.open'));
  await eventually(it.shown, 'picture 3');
  await it.act('older');
  await eventually(it.shown, 'picture 2');
});

test('a favourite is marked by key in both places', async (t) => {
  const it = await opened(t, new Studio(entries(2, 1)));
  await it.click(it.of(2, '.open'));
  await eventually(it.shown, 'picture 2');
  const states = () => it.run(() => ['.viewer [data-do=favourite]', '.tile[data-id="2"] .heart']
    .map((selector) => document.querySelector(selector).getAttribute('aria-pressed')));
  await it.key.press('f');
  await eventually(states, ['true', 'true']);
  await it.key.press('F');
  await eventually(states, ['false', 'false']);
});

test('a picture that is deleted in the large view is followed by the next, and Undo shows it again', async (t) => {
  const it = await opened(t, new Studio(entries(3, 2, 1)));
  await it.click(it.of(2, '.open'));
  await eventually(it.shown, 'picture 2');
  await it.key.press('Delete');
  await eventually(it.shown, 'picture 1');
  assert.deepEqual([await it.ids(), await it.told()], [['3', '1'], 'The picture was deleted.']);
  await it.click('.viewer [data-do=undo]');
  await eventually(it.shown, 'picture 2');
  await it.act('remove');
  await eventually(it.shown, 'picture 1');
  await it.act('remove');
  await eventually(it.shown, 'picture 3');
  await it.act('remove');
  await eventually(it.shown, '');
  assert.deepEqual(await it.ids(), []);
});

test('a lost file can be made again, and nothing else', async (t) => {
  const it = await opened(t, new Studio([entry(1, {missing: true})]));
  await it.click(it.of(1, '.open'));
  await eventually(it.shown, 'picture 1');
  assert.match(await it.text('figure .lost'), /Run again makes it once more/);
  const offered = (name) => it.run((act) => !document.querySelector(`.viewer [data-do=${act}]`).disabled, name);
  assert.deepEqual([await offered('edit'), await offered('multi'), await offered('again')], [false, false, true]);
  assert.equal(await it.seen('[data-do=download]'), false);
});

test('what is sent to a form is the picture that is seen', async (t) => {
  const it = await opened(t, new Studio(entries(3, 2, 1)));
  for (const [id, name] of [['3', 'edit'], ['1', 'vary'], ['2', 'again'], ['1', 'reuse'], ['2', 'multi']]) {
    await it.click(it.of(id, '.open'));
    await eventually(it.shown, `picture ${id}`);
    await it.act(name);
    assert.deepEqual(await it.pressed(), [[`history-${name}`, id]]);
    await eventually(it.shown, '');
  }
});

test('a form that was filled runs as soon as it may', async (t) => {
  const it = await opened(t, new Studio(entries(1)));
  await it.run(() => {
    document.querySelector('.run').disabled = true;
    window.studioHistory.run('generate');
  });
  await it.tick(3000);
  assert.deepEqual(await it.pressed(), []);
  await it.run(() => { document.querySelector('.run').disabled = false; });
  await it.tick(150);
  await it.tick(3000);
  assert.deepEqual((await it.pressed()).map(([name]) => name), ['run']);
});

test('a form that one has left does not run later', async (t) => {
  const it = await opened(t, new Studio(entries(1)));
  await it.run(() => {
    document.querySelector('.run').disabled = true;
    window.studioHistory.run('generate');
  });
  await it.tick(600);
  await it.run(() => { document.getElementById('generate').style.display = 'none'; });
  await it.tick(150);
  await it.run(() => { document.querySelector('.run').disabled = false; });
  await it.tick(3000);
  assert.deepEqual(await it.pressed(), []);
});
