// The History tab: a grid that is drawn from /history/page, and one picture large.
// Texts of users only ever become text (textContent, attributes), never HTML.
(() => {
  'use strict';
  const POLL = 5000;  // milliseconds between two looks for new pictures, while the tab is seen
  const UNDO = 30000;  // and how long Undo is offered; after that the trash below the grid offers it for a day
  const base = () => `${location.pathname.replace(/\/?$/, '/')}history/`;

  let root = null;  // what the tab's HTML holds
  let entries = [];  // as /history/page gives them, newest first
  let more = null;  // the cursor of the next page
  let asking = 0;  // the number of the last question: an older one's answer is not shown
  let listed = 0;  // the number of the question that the list answers
  let loading = false;
  let changes = 0;  // made here: a list that was asked for before one of them is out of date
  let shown = null;  // the id of the picture that is open, or about to be
  let left = null;  // and of the one that was closed last
  let deleted = [];  // what Undo would bring back
  let trashed = [];
  let hide = 0;
  const picked = new Set();
  let anchor = null;  // the id that was picked last, from which Shift picks a range

  const part = (selector) => root.querySelector(selector);
  const make = (tag, attributes = {}, ...inside) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) made.setAttribute(name, value === true ? '' : value);
    }
    made.append(...inside);
    return made;
  };
  const say = (text, undo = false) => {
    const told = part('.told');
    (part('.viewer').open ? part('.viewer') : part('.history')).append(told);  // a dialog covers all beside it
    told.querySelector('span').textContent = text;
    told.querySelector('button').hidden = !undo;
    told.hidden = !text;
    clearTimeout(hide);
    if (text) hide = setTimeout(() => { told.hidden = true; }, UNDO);
  };
  const ask = async (path, body) => {
    const sent = body === undefined
      ? {}
      : {method: 'POST', headers: {'Content-Type': 'application/json'}, body: JSON.stringify(body)};
    let answer;
    try {
      answer = await fetch(base() + path, sent);
    } catch {
      throw new Error(studioSay('The studio does not answer: see whether it still runs.'));
    }
    if (!answer.ok) throw new Error((await answer.text()).slice(0, 300));
    return answer.json();
  };
  const told = (action) => async (...given) => {
    try {
      return await action(...given);
    } catch (error) {
      say(error.message);
      return null;
    }
  };

  // --- the grid

  const day = (value, later) => {
    if (!value) return '';
    const [year, month, date] = value.split('-').map(Number);
    return String(Math.max(0, new Date(year, month - 1, date + later).getTime()));
  };
  const query = () => {
    const form = part('.filters').elements;
    const asked = new URLSearchParams();
    for (const [name, value] of [
      ['words', form.words.value.trim()], ['checkpoint', form.checkpoint.value], ['since', day(form.since.value, 0)],
      ['until', day(form.until.value, 1)], ['favourites', form.favourites.checked ? '1' : ''],
    ]) if (value) asked.set(name, value);
    return asked;
  };
  const describe = (entry) => `${entry.prompt || studioSay('Picture')} (${new Date(entry.created).toLocaleString()})`;
  const small = (path, alt) => {
    const image = make('img', {src: base() + path, alt, loading: 'lazy', decoding: 'async', draggable: 'false'});
    image.addEventListener('error', () => {
      image.replaceWith(make('span', {class: 'lost'}, studioSay('This file is missing or damaged')));
    });
    return image;
  };
  const tile = (entry) => {
    const inside = entry.missing
      ? make('span', {class: 'lost'}, studioSay('The file is missing'))
      : small(`thumbnail/${entry.id}`, '');
    const open = make('button', {type: 'button', class: 'open', 'aria-label': studioSay('Open: {picture}', {picture: describe(entry)})}, inside);
    const pick = make('input', {type: 'checkbox', class: 'pick', 'aria-label': studioSay('Select: {picture}', {picture: describe(entry)})});
    pick.checked = picked.has(entry.id);
    const heart = make('button', {type: 'button', class: 'heart', 'aria-label': studioSay('Favourite: {picture}', {picture: describe(entry)})});
    const made = make('div', {class: 'tile', role: 'listitem', 'data-id': entry.id}, open, pick, heart);
    mark(made, entry);
    return made;
  };
  const mark = (made, entry) => {
    const heart = made.querySelector('.heart');
    heart.textContent = entry.favourite ? '♥' : '♡';
    heart.setAttribute('aria-pressed', String(entry.favourite));
  };
  const find = (id) => entries.find((entry) => entry.id === id);
  const tileOf = (id) => root.querySelector(`.tile[data-id="${id}"]`);

  const tidy = (counted) => {
    const {count, all} = counted ?? {count: entries.length, all: entries.length};
    const bar = part('.picked');
    bar.hidden = !picked.size;
    part('.history').classList.toggle('picking', picked.size > 0);
    part('.count').dataset.count = count;
    part('.count').textContent = picked.size
      ? studioSay('{count} selected', {count: picked.size})
      : count !== all ? studioSay('{done} of {count} pictures', {done: count, count: all})
        : count === 1 ? studioSay('1 picture') : studioSay('{count} pictures', {count});
    const nothing = part('.nothing');
    nothing.hidden = entries.length > 0;
    if (!entries.length) {
      nothing.replaceChildren(...(all
        ? [make('p', {class: 'lead'}, studioSay('Nothing matches.')),
          make('p', {}, studioSay('Use fewer words, or press Clear to see all pictures.'))]
        : [make('p', {class: 'lead'}, studioSay('Your pictures will gather here.')),
          make('p', {}, studioSay('Make the first one on the Generate tab. Each stays with all its settings, '
            + 'to be found, reused and varied.'))]));
    }
    part('.filters').hidden = part('.bar').hidden = !all;
    const trash = part('.trash');
    trash.hidden = !trashed.length;
    trash.querySelector('span').textContent = trashed.length === 1
      ? studioSay('1 deleted picture is kept for a day.')
      : studioSay('{count} deleted pictures are kept for a day.', {count: trashed.length});
    trash.querySelector('[data-do="empty"]').textContent = studioSay('Remove for good');
  };
  let counts = null;
  const choices = (checkpoints) => {
    const select = part('.filters').elements.checkpoint;
    const now = select.value;
    select.replaceChildren(make('option', {value: ''}, studioSay('Every checkpoint')),
      ...checkpoints.map(({name, label}) => make('option', {value: name}, studioSay(label))));
    select.value = checkpoints.some(({name}) => name === now) ? now : '';
  };
  const opened = (page) => {
    choices(page.checkpoints);
    counts = {count: page.count, all: page.all};
    trashed = page.trashed;
  };

  const load = told(async () => {  // the first page, anew
    const mine = ++asking;
    const page = await ask(`page?${query()}`);
    if (mine !== asking) return;
    entries = page.entries;
    more = page.more;
    listed = mine;
    picked.clear();
    opened(page);
    part('.grid').replaceChildren(...entries.map(tile));
    tidy(counts);
    fill();  // not awaited: the first page is there
  });
  const extend = told(async () => {
    // While another question is on its way, `more` is the end of the list before it.
    if (!more || loading || listed !== asking) return;
    loading = true;
    const mine = asking;
    try {
      const asked = query();
      asked.set('before', more);
      const page = await ask(`page?${asked}`);
      if (mine === asking) {
        more = page.more;
        const fresh = page.entries.filter((entry) => !find(entry.id));
        entries.push(...fresh);
        part('.grid').append(...fresh.map(tile));
      }
    } finally {
      loading = false;
    }
    await fill();
  });
  // The observer tells only of a change: where the end is seen still, there is room for more.
  const fill = async () => {
    const end = part('.more');
    if (end.offsetParent && end.getBoundingClientRect().top < innerHeight + 600) await extend();
  };
  // New pictures at the top, and what was changed or deleted elsewhere, without moving what one looks at.
  const refresh = told(async () => {
    const [mine, before] = [asking, changes];
    const page = await ask(`page?${query()}`);
    if (mine !== asking || before !== changes) return;
    const last = page.entries.at(-1);
    if (!last || !entries.length || !find(last.id)) {
      if (JSON.stringify(page.entries) !== JSON.stringify(entries.slice(0, page.entries.length))
          || page.entries.length !== entries.length) await load();
      else { opened(page); tidy(counts); }
      return;
    }
    const there = new Set(page.entries.map((entry) => entry.id));
    const reach = entries.findIndex((entry) => entry.id === last.id);
    for (const gone of entries.slice(0, reach).filter((entry) => !there.has(entry.id))) {
      tileOf(gone.id).remove();
      picked.delete(gone.id);
    }
    const grid = part('.grid');
    page.entries.forEach((entry, place) => {
      const old = tileOf(entry.id);
      const earlier = find(entry.id);
      if (!old) grid.insertBefore(tile(entry), grid.children[place] ?? null);
      else if (earlier.missing !== entry.missing) old.replaceWith(tile(entry));
      else mark(old, entry);
    });
    entries = [...page.entries, ...entries.slice(reach + 1)];
    opened(page);
    tidy(counts);
  });

  // --- one picture

  const row = (target, section, items) => {
    section.hidden = !items.length;
    target.replaceChildren(...items.map((item) => {
      if (item.id) {
        const inside = item.missing ? make('span', {class: 'lost'}, studioSay('missing')) : small(`thumbnail/${item.id}`, '');
        return make('button', {type: 'button', 'data-open': item.id, 'aria-label': studioSay('Open: {picture}', {picture: describe(item)})}, inside);
      }
      return make('span', {class: 'outside', title: studioSay('Not in History')},
        item.kept ? small(`source/${item.source}`, studioSay('A reference from outside History')) : studioSay('not kept here'));
    }));
  };
  const show = told(async (id) => {
    const viewer = part('.viewer');
    shown = id;
    const entry = await ask(`entry/${id}`);
    if (shown !== id) return;
    const image = part('.viewer figure img');
    const lost = part('.viewer figure .lost');
    const missing = (gone) => {
      image.hidden = gone;
      lost.hidden = !gone;
      lost.textContent = gone
        ? studioSay('The file of this picture is missing or damaged. Run again makes it once more.') : '';
    };
    missing(entry.missing);
    image.onerror = () => missing(true);
    if (entry.missing) image.removeAttribute('src'); else image.src = `${base()}picture/${id}`;
    image.alt = entry.prompt;
    window.studioCompare.viewer(viewer, entry.before && !entry.missing ? `${base()}before/${id}` : null);
    part('.viewer .prompt-text').textContent = entry.prompt;
    part('.viewer tbody').replaceChildren(
      make('tr', {}, make('th', {scope: 'row'}, studioSay('Made')), make('td', {}, new Date(entry.created).toLocaleString())),
      ...entry.rows.map(([name, text]) => make('tr', {}, make('th', {scope: 'row'}, studioSay(name)), make('td', {}, text))));
    row(part('.viewer .from .row'), part('.viewer .from'), entry.madeFrom);
    row(part('.viewer .into .row'), part('.viewer .into'), entry.madeInto);
    const link = part('.viewer a[data-do="download"]');
    link.href = `${base()}picture/${id}?download=1`;
    link.hidden = entry.missing;
    for (const name of ['edit', 'multi']) part(`.viewer [data-do="${name}"]`).disabled = entry.missing;
    hearted(entry.favourite);
    const place = entries.findIndex((one) => one.id === id);
    part('.viewer [data-do="newer"]').disabled = place <= 0;
    part('.viewer [data-do="older"]').disabled = place < 0 || (place === entries.length - 1 && !more);
    if (!viewer.open) {
      part('.told').hidden = true;
      viewer.showModal();
    }
    viewer.scrollTop = part('.viewer .side').scrollTop = 0;
  });
  const hearted = (on) => {
    const button = part('.viewer [data-do="favourite"]');
    button.textContent = on ? studioSay('♥ Favourite') : studioSay('♡ Favourite');
    button.setAttribute('aria-pressed', String(on));
  };
  const step = async (by) => {
    const place = entries.findIndex((entry) => entry.id === shown);
    if (place < 0) return;
    if (by > 0 && place === entries.length - 1) await extend();
    const next = entries[place + by];
    if (next) await show(next.id);
  };
  // At once: the browser tells of it later, when another one may be asked for.
  const leave = () => { [left, shown] = [shown, null]; };
  const close = () => {
    if (!part('.viewer').open) return;
    leave();
    part('.viewer').close();
  };

  // --- changes

  const favourite = told(async (id, on) => {
    await ask('favourite', {ids: [id], on});
    changes += 1;
    const entry = find(id);
    if (entry) { entry.favourite = on; mark(tileOf(id), entry); }
    if (shown === id) hearted(on);
  });
  const remove = told(async (ids) => {
    const gone = (await ask('delete', {ids})).ids;
    changes += 1;
    const open = part('.viewer').open;
    const place = entries.findIndex((entry) => entry.id === shown);
    for (const id of gone) { tileOf(id)?.remove(); picked.delete(id); }
    entries = entries.filter((entry) => !gone.includes(entry.id));
    deleted = gone;
    trashed = [...gone, ...trashed];
    if (counts) { counts.count -= gone.length; counts.all -= gone.length; }
    tidy(counts);
    if (open) {
      const next = entries[Math.min(Math.max(place, 0), entries.length - 1)];
      if (next) await show(next.id); else close();
    }
    say(gone.length === 1 ? studioSay('The picture was deleted.')
      : studioSay('{count} pictures were deleted.', {count: gone.length}), true);
    if (!open) part('.told button').focus();  // where the focus was is gone
  });
  const restore = told(async (ids) => {
    const back = (await ask('restore', {ids})).ids;
    deleted = [];
    await load();
    say(back.length === 1 ? studioSay('The picture is back.')
      : studioSay('{count} pictures are back.', {count: back.length}));
    if (part('.viewer').open && back.length === 1) await show(back[0]);
  });
  // With Shift, all from the one that was picked last to this one.
  const pick = (id, on, range) => {
    const [from, to] = [anchor, id].map((one) => entries.findIndex((entry) => entry.id === one));
    const all = range && from >= 0 ? entries.slice(Math.min(from, to), Math.max(from, to) + 1) : [find(id)];
    for (const entry of all) {
      if (on) picked.add(entry.id); else picked.delete(entry.id);
      tileOf(entry.id).querySelector('.pick').checked = on;
    }
    anchor = id;
    tidy(counts);
  };
  const send = (name) => {
    window.studioHistory.asked = shown;
    close();
    document.getElementById(`history-${name}`).click();
  };
  const acts = {
    close,
    newer: () => step(-1),
    older: () => step(1),
    favourite: () => favourite(shown, part('.viewer [data-do="favourite"]').getAttribute('aria-pressed') !== 'true'),
    remove: () => remove([shown]),
    undo: () => { if (deleted.length) restore(deleted); },
    back: () => restore(trashed),
    empty: told(async (button) => {
      if (button.textContent === studioSay('Remove for good')) {
        button.textContent = studioSay('Really remove?');
        return;
      }
      await ask('empty', {});
      trashed = deleted = [];
      tidy(counts);
      say(studioSay('The deleted pictures are gone for good.'));
    }),
    all: () => {
      entries.slice(0, 200).forEach((entry) => picked.add(entry.id));
      root.querySelectorAll('.pick').forEach((box) => { box.checked = picked.has(box.closest('.tile').dataset.id); });
      tidy(counts);
    },
    none: () => {
      picked.clear();
      root.querySelectorAll('.pick').forEach((box) => { box.checked = false; });
      tidy(counts);
    },
    delete: () => remove([...picked].slice(0, 200)),
    zip: () => {
      if (picked.size > 200) { say(studioSay('Choose at most 200 pictures to download at once.')); return; }
      const link = make('a', {href: `${base()}zip?ids=${[...picked].join(',')}`, download: true, hidden: true});
      root.append(link);
      link.click();
      link.remove();
    },
    ...Object.fromEntries(['edit', 'multi', 'reuse', 'again', 'vary'].map((name) => [name, () => send(name)])),
  };

  // --- what is heard

  const listen = () => {
    root.addEventListener('click', (event) => {
      const button = event.target.closest('[data-do]');
      if (button && acts[button.dataset.do]) { if (button.tagName !== 'A') acts[button.dataset.do](button); return; }
      const other = event.target.closest('[data-open]');
      if (other) { show(other.dataset.open); return; }
      if (event.target === part('.viewer')) { close(); return; }  // beside the picture
      const id = event.target.closest('.tile')?.dataset.id;
      if (!id) return;
      if (event.target.matches('.pick')) pick(id, event.target.checked, event.shiftKey);
      else if (event.target.closest('.heart')) favourite(id, !find(id).favourite);
      else if (event.shiftKey && event.target.closest('.open')) pick(id, !picked.has(id), true);
      else if (event.target.closest('.open')) show(id);
    });
    let wait = 0;
    const search = () => { clearTimeout(wait); wait = setTimeout(load, 200); };
    part('.filters').addEventListener('input', search);
    part('.filters').addEventListener('reset', search);
    part('.filters').addEventListener('submit', (event) => { event.preventDefault(); load(); });
    part('.viewer').addEventListener('cancel', leave);
    part('.viewer').addEventListener('close', () => {
      if (part('.viewer').open) return;  // again, by now
      part('.history').append(part('.told'));
      tileOf(left)?.querySelector('.open').focus();
    });
    part('.viewer').addEventListener('keydown', (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || event.target.type === 'range') return;
      const act = {ArrowLeft: 'newer', ArrowRight: 'older', f: 'favourite', F: 'favourite', Delete: 'remove'}[event.key];
      if (!act) return;
      event.preventDefault();
      acts[act]();
    });
    let start = null;
    const figure = part('.viewer figure');
    figure.addEventListener('touchstart', (event) => {
      // A finger on the slider of the comparison turns no page.
      start = event.touches.length === 1 && !figure.matches('.comparing') ? event.touches[0] : null;
    }, {passive: true});
    figure.addEventListener('touchend', (event) => {
      if (!start) return;
      const [across, down] = ['clientX', 'clientY'].map((side) => event.changedTouches[0][side] - start[side]);
      start = null;
      if (Math.abs(across) > 50 && Math.abs(across) > 2 * Math.abs(down)) step(across < 0 ? 1 : -1);
    }, {passive: true});
    new IntersectionObserver((seen) => { if (seen.some((one) => one.isIntersecting)) extend(); },
      {rootMargin: '600px'}).observe(part('.more'));
    let first = true;
    new IntersectionObserver((seen) => {
      if (!seen.at(-1).isIntersecting) return;
      if (first) load(); else refresh();
      first = false;
    }).observe(part('.history'));
  };
  const seen = () => root?.isConnected && root.offsetParent && document.visibilityState === 'visible';
  setInterval(() => { if (seen()) refresh(); }, POLL);

  // Gradio puts a tab's contents into the page when it is first opened.
  new MutationObserver(() => {
    const there = document.getElementById('history-root');
    if (!there || there === root || !there.querySelector('.viewer')) return;
    root = there;
    entries = [];
    picked.clear();
    listen();
  }).observe(document, {childList: true, subtree: true});

  window.studioHistory = {
    asked: '',
    ask, make, small, describe,  // for other views of the same pictures
    // Press the run button of a form that was just filled, as soon as it may be pressed.
    run: (form) => {
      let visible = false;
      const attempt = () => {
        const button = document.querySelector(`#${form} .run`);
        const there = Boolean(button?.offsetParent);
        if (button && !button.disabled) { button.click(); return; }
        if (visible && !there) return;  // somebody waited for another run, and went elsewhere
        visible = there;
        setTimeout(attempt, 150);
      };
      setTimeout(attempt, 300);  // until the fields have taken what came for them
    },
  };
})();
