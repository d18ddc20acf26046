// Pictures of History as references: a dialog over Edit, which takes one, and Multi-reference, which takes several in the
// order in which they are chosen.
(() => {
  'use strict';
  const ONE = ['edit'];  // forms of one reference
  const PAUSE = 200;  // milliseconds without a letter until it searches

  let dialog = null;
  let form = '';
  let chosen = [];  // ids, in their order
  let more = null;  // the cursor of the next page
  let asking = 0;  // the number of the last question: an older one's answer is not shown
  let loading = false;

  const part = (selector) => dialog.querySelector(selector);
  const say = (text) => { part('[role=status]').textContent = text; };
  const mark = () => {
    for (const tile of dialog.querySelectorAll('.tile')) {
      const place = chosen.indexOf(tile.dataset.id);
      tile.setAttribute('aria-pressed', String(place >= 0));
      tile.querySelector('.place').textContent = place >= 0 ? place + 1 : '';
    }
    const add = part('.add');
    add.hidden = !chosen.length;
    add.textContent = chosen.length === 1
      ? studioSay('Add 1 picture') : studioSay('Add {count} pictures', {count: chosen.length});
  };
  const tile = (entry) => {
    const {make, small, describe} = window.studioHistory;
    const inside = entry.missing
      ? make('span', {class: 'lost'}, studioSay('The file is missing')) : small(`thumbnail/${entry.id}`, '');
    const attributes = {
      type: 'button', class: 'tile', 'data-id': entry.id, 'aria-label': describe(entry), title: entry.prompt,
      disabled: entry.missing,
    };
    return make('button', attributes, inside, make('span', {class: 'place', 'aria-hidden': 'true'}));
  };
  const load = async (before) => {
    const mine = ++asking;
    loading = true;
    const asked = new URLSearchParams();
    const words = part('input').value.trim();
    if (words) asked.set('words', words);
    if (before) asked.set('before', before);
    try {
      const page = await window.studioHistory.ask(`page?${asked}`);
      if (mine !== asking) return;
      const tiles = page.entries.map(tile);
      if (before) part('.grid').append(...tiles); else part('.grid').replaceChildren(...tiles);
      more = page.more;
      say(tiles.length || before ? '' : words ? studioSay('Nothing matches.')
        : studioSay('No picture yet: make the first one on the Generate tab.'));
      mark();
    } catch (error) {
      if (mine === asking) say(error.message);
    } finally {
      if (mine === asking) loading = false;
    }
    extend();
  };
  const extend = () => {
    const grid = part('.grid');
    if (more && !loading && dialog.open && grid.scrollTop + grid.clientHeight > grid.scrollHeight - 300) load(more);
  };
  const send = () => {
    window.studioHistory.asked = chosen.join(',');
    dialog.close();
    document.getElementById(`${form}-pick`).click();
  };

  const listen = () => {
    dialog.addEventListener('click', (event) => {
      const pressed = event.target.closest('.tile');
      if (pressed) {
        const {id} = pressed.dataset;
        if (ONE.includes(form)) { chosen = [id]; send(); return; }
        chosen = chosen.includes(id) ? chosen.filter((other) => other !== id) : [...chosen, id];
        mark();
      } else if (event.target.closest('.add')) send();
      else if (event.target === dialog || event.target.closest('.close')) dialog.close();  // beside it, too
    });
    part('.grid').addEventListener('scroll', extend);
    let wait = 0;
    part('input').addEventListener('input', () => {
      clearTimeout(wait);
      wait = setTimeout(() => load(), PAUSE);
    });
  };

  window.studioPicker = {
    open: (name) => {
      const there = document.getElementById('picker');
      if (there !== dialog) {
        dialog = there;
        listen();
      }
      [form, chosen, more] = [name, [], null];
      part('input').value = '';
      part('.grid').replaceChildren();
      say(studioSay('Looking…'));
      mark();
      dialog.showModal();
      load();
    },
  };
})();
