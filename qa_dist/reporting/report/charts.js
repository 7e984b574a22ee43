"use strict";

// The point whose place is nearest.
const nearest = (points, place) => {
  let best = 0;
  points.forEach((point, i) => {
    if (Math.abs(point[2] - place) < Math.abs(points[best][2] - place)) best = i;
  });
  return points[best];
};

// Lets the pointer and the arrow keys read the values of all charts.
const makeReadable = (charts) => {
  for (const chart of document.querySelectorAll(".chart")) {
    const lines = charts[chart.dataset.chart];
    const plot = chart.querySelector(".plot"), drawing = plot.querySelector("svg");
    const cursor = drawing.querySelector(".cursor"), at = chart.querySelector(".at");
    const values = chart.querySelectorAll(".legend b"), spoken = chart.querySelector("output");
    const places = [...new Set(lines.flatMap((line) => line.points.map((point) => point[2])))].sort((a, b) => a - b);
    let shown = -1;

    const show = (place, speak) => {
      const found = lines.map((line) => nearest(line.points, place));
      const here = found.reduce((a, b) => (Math.abs(b[2] - place) < Math.abs(a[2] - place) ? b : a));
      cursor.setAttribute("x1", here[2]);
      cursor.setAttribute("x2", here[2]);
      cursor.setAttribute("visibility", "visible");
      at.textContent = `${at.dataset.x} ${here[0]}`;
      // lines that have no point near the cursor say nothing there
      found.forEach((point, i) => (values[i].textContent = Math.abs(point[2] - here[2]) < 4 ? point[1] : ""));
      if (speak) {
        const words = lines.map((line, i) => (values[i].textContent ? `${line.name} ${values[i].textContent}` : ""));
        spoken.textContent = `${at.textContent}: ${words.filter(Boolean).join(", ")}`;
      }
    };
    const hide = () => {
      cursor.setAttribute("visibility", "hidden");
      at.textContent = "";
      values.forEach((value) => (value.textContent = ""));
    };
    plot.addEventListener("pointermove", (event) => {
      const box = drawing.getBoundingClientRect();
      show(((event.clientX - box.left) / box.width) * drawing.viewBox.baseVal.width, false);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const moves = { ArrowLeft: shown - 1, ArrowRight: shown + 1, Home: 0, End: places.length - 1 };
      if (!(event.key in moves)) return;
      event.preventDefault();
      shown = Math.min(Math.max(moves[event.key], 0), places.length - 1);
      show(places[shown], true);
    });
  }
};
