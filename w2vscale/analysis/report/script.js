"use strict";
// Shows the values of all visible curves where the pointer is. The page is complete without it.
for (const chart of document.querySelectorAll(".chart")) {
  const [low, high, left, right] = chart.dataset.x.split(" ").map(Number);
  const y = chart.dataset.y.split(" ").map(Number);
  const logarithmic = "log" in chart.dataset;
  const percent = "percent" in chart.dataset;
  const curves = [...chart.querySelectorAll("[data-name]")].map((path) => ({
    path,
    points: [...path.getAttribute("d").matchAll(/[ML](-?[\d.]+) (-?[\d.]+)/g)].map((found) => [+found[1], +found[2]]),
  }));
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cursor.setAttribute("class", "cursor");
  const box = document.createElement("div");
  box.className = "values";
  const valueAt = (place) => {
    const share = (place - y[2]) / (y[3] - y[2]);
    return logarithmic ? y[0] * (y[1] / y[0]) ** share : y[0] + share * (y[1] - y[0]);
  };
  const line = (text, name, classes) => {
    const row = document.createElement("span");
    if (name) {
      const label = document.createElement("b");
      label.textContent = name;
      row.className = classes;
      row.append(label);
    }
    row.append(text);
    return row;
  };
  const hide = () => { cursor.remove(); box.remove(); };
  chart.addEventListener("pointerleave", hide);
  const show = (event) => {
    const bounds = chart.getBoundingClientRect();
    // Names of lines are to the right of the plot: there, the values at its end are shown.
    const at = Math.min(((event.clientX - bounds.left) / bounds.width) * chart.viewBox.baseVal.width, right);
    if (at < left) { hide(); return; }
    const rows = [];
    let nearest = null;
    for (const { path, points } of curves) {
      if (!points.length || !path.getClientRects().length) continue;
      const point = points.reduce((best, one) => (Math.abs(one[0] - at) < Math.abs(best[0] - at) ? one : best));
      if (Math.abs(point[0] - at) > (right - left) / 4) continue;
      if (nearest === null || Math.abs(point[0] - at) < Math.abs(nearest - at)) nearest = point[0];
      const value = Number((valueAt(point[1]) * (percent ? 100 : 1)).toPrecision(3));
      rows.push(line(`${value}${percent ? "%" : ""}`, path.dataset.name, path.parentNode.getAttribute("class")));
    }
    if (nearest === null) { hide(); return; }
    const x = low + ((nearest - left) / (right - left)) * (high - low);
    const hours = chart.classList.contains("by-hours");
    const digits = hours && high < 100 ? 2 : 0;
    const number = x.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
    box.replaceChildren(line(hours ? `${number} hours seen` : `near update ${number}`), ...rows);
    cursor.setAttribute("d", `M${nearest} ${y[3]}V${y[2]}`);
    chart.append(cursor);
    const figure = chart.parentNode;
    figure.append(box);
    const frame = figure.getBoundingClientRect();
    const beside = event.clientX - frame.left + 14;
    box.style.left = `${Math.max(4, Math.min(beside, frame.width - box.offsetWidth - 4))}px`;
    box.style.top = `${bounds.top - frame.top + bounds.height * 0.84}px`;
  };
  chart.addEventListener("pointermove", show);
  chart.addEventListener("pointerdown", show);
}
addEventListener("beforeprint", () => {
  for (const details of document.querySelectorAll("details")) details.open = true;
});
