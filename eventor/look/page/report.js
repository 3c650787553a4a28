"use strict";
{
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const by = (id) => document.getElementById(id);

  // Times: those of the page are UTC, those of the reader are local.
  const two = (number, length = 2) => String(number).padStart(length, "0");
  for (const time of all("time")) {
    const at = new Date(time.dateTime);
    const clock = [at.getHours(), at.getMinutes(), at.getSeconds()].map((n) => two(n)).join(":");
    const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())} `;
    time.title = `${time.dateTime.replace("T", " ").replace("Z", "")} UTC`;
    time.textContent =
      `${time.className === "clock" ? "" : day}${clock}.${two(at.getMilliseconds(), 3)}`;
  }
  const zone = Intl.DateTimeFormat().resolvedOptions().timeZone;
  if (zone && zone !== "UTC") by("zone").textContent = `${zone}; point at one for UTC`;

  // Sorting: by what is recorded where there is such a value, else by the text.
  const words = new Intl.Collator(undefined, { numeric: true });
  const value = (row, index) => {
    const cell = row.cells[index];
    if (cell.dataset.v) return Number(cell.dataset.v);
    return cell.querySelector(".name")?.textContent ?? cell.textContent.trim();
  };
  const compare = (a, b) => (typeof a === "number" ? a - b : words.compare(a, b));
  const sort = (table, heading) => {
    const descending = heading.ariaSort === "ascending";
    for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
    const body = table.tBodies[0];
    const keyed = [...body.rows].map((row) => [value(row, heading.cellIndex), row]);
    keyed.sort(([a], [b]) => (a === "") - (b === "") || compare(a, b) * (descending ? -1 : 1));
    body.append(...keyed.map(([, row]) => row));
  };
  for (const table of all("table.sortable")) {
    for (const heading of all("thead th", table)) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      button.addEventListener("click", () => sort(table, heading));
      heading.append(button);
    }
  }

  // Finding: what is not found is left out of the table, and faint in the timeline.
  const rows = all("#all tbody tr");
  const bars = new Map(all(".b").map((bar) => [`t${bar.dataset.t}`, bar]));
  const boxes = all("#statuses input");
  const texts = new Map();
  const text = (row) => {
    if (!texts.has(row)) texts.set(row, row.textContent.toLowerCase());
    return texts.get(row);
  };
  const filter = () => {
    const sought = by("find").value.trim().toLowerCase();
    const wanted = new Set(boxes.filter((box) => box.checked).map((box) => box.value));
    let found = 0;
    for (const row of rows) {
      const fits = wanted.has(row.dataset.s) && (!sought || text(row).includes(sought));
      row.hidden = !fits;
      bars.get(row.id)?.classList.toggle("off", !fits);
      found += fits;
    }
    by("none").hidden = found > 0;
    by("found").textContent = found === rows.length ? "" : `${found} of ${rows.length}`;
  };
  if (rows.length) {
    by("find").addEventListener("input", filter);
    by("statuses").addEventListener("change", filter);
    for (const element of all(".needs-script")) element.hidden = false;
    filter();
  }

  // The timeline: what is pointed at is told at once, and a click leads to its row.
  const tip = document.createElement("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);
  for (const bar of bars.values()) {
    bar.dataset.told = bar.title;
    bar.removeAttribute("title");
  }
  const area = document.querySelector(".area");
  area?.addEventListener("pointermove", (event) => {
    const bar = event.target.closest(".b");
    tip.hidden = !bar;
    if (!bar) return;
    tip.textContent = bar.dataset.told;
    const { width, height } = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(event.clientX + 14, innerWidth - width - 8))}px`;
    const under = event.clientY + 18;
    tip.style.top = `${under + height < innerHeight ? under : event.clientY - height - 10}px`;
  });
  area?.addEventListener("pointerleave", () => (tip.hidden = true));
  const show = (row) => {
    if (row.hidden) {
      by("find").value = "";
      for (const box of boxes) box.checked = true;
      filter();
    }
    for (const other of all("tr.shown")) other.classList.remove("shown");
    row.classList.add("shown");
    row.scrollIntoView({ block: "center" });
  };
  area?.addEventListener("click", (event) => {
    const bar = event.target.closest(".b");
    if (bar) show(by(`t${bar.dataset.t}`));
  });
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#t"]');
    const row = link && by(link.hash.slice(1));
    if (row?.matches("#all tr")) {
      event.preventDefault();
      show(row);
    }
  });
}
