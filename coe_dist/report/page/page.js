// A slider moves the mark along the accuracy-MACs curve and says what the threshold gives. Without scripts it stays hidden.
for (const box of document.querySelectorAll(".explore")) {
  const points = JSON.parse(box.dataset.points);
  const mark = document.getElementById(box.dataset.mark);
  const [slider, said, back] = ["input", "output", "button"].map((name) => box.querySelector(name));
  const own = slider.value;
  const show = () => {
    const point = points[slider.value];
    mark.setAttribute("transform", `translate(${point.x} ${point.y})`);
    said.textContent = point.text;
    slider.setAttribute("aria-valuetext", point.text);
  };
  slider.addEventListener("input", show);
  back.addEventListener("click", () => {
    slider.value = own;
    show();
  });
  slider.value = own; // a reloaded page may remember another place
  box.hidden = false;
  show();
}
