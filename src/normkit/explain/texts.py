"""The sentences of the worked examples, in English and Chinese, with places for the numbers that steps.py computes.

Here: `sentence`, `title`, `name`, `LANGUAGES`.
May import: steps (for Step).
Read next: show.py, which prints them.
"""

from __future__ import annotations

from normkit.explain.steps import Step

LANGUAGES = ("en", "zh")

_TITLES = {
    "en": {
        "batchnorm": "BatchNorm: every subject over all students",
        "layernorm": "LayerNorm: every student over all subjects",
        "rmsnorm": "RMSNorm: LayerNorm without taking the mean off",
        "running": "Running statistics: a thermometer with three memories",
        "placement": "PostNorm and PreNorm: what one residual step keeps of its input",
        "saturation": "Saturation: when a sigmoid stops learning, and what BatchNorm does about it",
    },
    "zh": {
        "batchnorm": "BatchNorm：按科目，对所有学生归一化",
        "layernorm": "LayerNorm：按学生，对所有科目归一化",
        "rmsnorm": "RMSNorm：不减均值的 LayerNorm",
        "running": "滑动统计量：一支有三种记忆的温度计",
        "placement": "PostNorm 与 PreNorm：一个残差步保留了多少输入",
        "saturation": "饱和：sigmoid 何时停止学习，BatchNorm 如何应对",
    },
}

_NAMES_ZH = {
    "student a": "学生甲",
    "student b": "学生乙",
    "maths": "数学",
    "physics": "物理",
    "history": "历史",
    "mean": "均值",
    "variance": "方差",
    "running mean": "滑动均值",
    "running variance": "滑动方差",
    "mean square": "均方",
    "root": "均方根",
    "value": "当天的值",
    "all so far": "至今的均值",
    "left of the start": "初值的残留",
    "updates": "更新次数",
    "noise": "噪声",
    "derivative": "导数／最大值",
}
_NAMES_EN = {"derivative": "derivative / its maximum"}

_TEXTS: dict[str, dict[str, dict[str, str]]] = {
    "en": {
        "batchnorm": {
            "own table": "{rows} rows, the samples, with {columns} columns, the features.",
            "table": "A batch of {rows} rows, the students, with {columns} features each, the subjects.",
            "statistics": "Each column shares its statistics: mean = sum / {n}, variance = sum of (x - mean)^2 / {n}.",
            "normalize": "Every number: (x - mean) / sqrt(variance + eps), eps = {eps:g}. gamma = 1 and beta = 0 change nothing yet.",
            "by hand": "By hand, {row}, {column}: ({x:g} - {mean:g}) / sqrt({var:.6g} + 1e-05) = {out:.4f}.",
            "bound": "With {n} values in a column none can lie beyond sqrt({n} - 1) = {largest:.4f}; the largest here is {seen:.4f}. A result depends on who else is in the batch.",
            "running": "For evaluation, alone and without a batch, a running average is kept: new = 0.9 * old + 0.1 * batch, from 0 and 1 on. The variance goes in as sum / (n - 1): {unbiased:.6g} instead of {biased:.6g} in the first column.",
        },
        "layernorm": {
            "own table": "{rows} rows, the samples, with {columns} columns, the features.",
            "table": "The same kind of table: {rows} rows, the samples, with {columns} features each.",
            "statistics": "Each row shares its statistics, over its {n} numbers.",
            "normalize": "Every number: (x - mean) / sqrt(variance + eps), eps = {eps:g}, with the mean and variance of its row.",
            "by hand": "By hand, {row}, {column}: ({x:g} - {mean:g}) / sqrt({var:.6g} + 1e-05) = {out:.4f}.",
            "alone": "{row} normalized alone, without the other rows, differs by {difference:g}: there is no batch in it, training and evaluation are the same.",
        },
        "rmsnorm": {
            "own table": "{rows} rows, the samples, with {columns} columns, the features.",
            "table": "{rows} rows of {columns} features.",
            "statistics": "Each row has one statistic, the mean of its {n} squares, and its root.",
            "normalize": "Every number: x / sqrt(mean square + eps), eps = {eps:g}. Only the length is taken away, not the mean.",
            "sign": "Signs stay as they were: {negative} negative numbers, where LayerNorm makes {negative_layer}.",
            "same": "Take the mean off first and RMSNorm is LayerNorm; they differ by {difference:.1g} here.",
        },
        "running": {
            "series": "{n} values, one a day, from {low:.1f} to {high:.1f}. Each is what BatchNorm would call a batch's mean.",
            "own series": "{n} values, from {low:.4g} to {high:.4g}, taken in their order as days.",
            "rule": "A running average: new = decay * old + (1 - decay) * today, started at 0. After day 1 with decay {decay:g}: {decay:g} * 0 + 0.1 * {first:.2f} = {after:.2f}.",
            "track": "What the three remember, beside the day itself and the mean of all days so far:",
            "residual": "The start value 0 still weighs decay^t after t = {n} days:",
            "wait": "Until it weighs less than {share:.0%}, it takes so many updates; before, evaluation sees the start value:",
            "noise": "The price of a short memory: noise that stays, sqrt((1 - decay) / (1 + decay)) times that of a single day:",
        },
        "placement": {
            "vectors": "A stream x and what a sublayer adds, f(x). Variances {v_x:.4g} and {v_f:.4g}; f(x) contains {overlap:.3g} of x.",
            "add": "Their sum has variance {v_total:.4g}; uncorrelated it would be {sum:.4g}. PostNorm divides it by its root.",
            "kept": "Of x there is {kept:.4f} left. The formula: 1 / sqrt(1 + v), v = Var f / Var x = {v:.4g}, gives {expected:.4f}. At v = 1 that is 1 / sqrt(2) = 0.7071.",
            "depth": "So it goes on, the input's weight after 1 to 48 sublayers with v = {v:.4g}: post is multiplied every time, pre adds to an untouched stream and pays once, in its final norm:",
        },
        "saturation": {
            "layer": "A unit with {fan_in} inputs of variance 1 and weights of standard deviation {std:g}: z = w x has {std:g} * sqrt({fan_in}) = {spread:.4g}. Nine units from -2 to 2 deviations:",
            "own": "{n} pre-activations with standard deviation {spread:.4g}:",
            "sigmoid": "Beyond |z| = {threshold:.3f} a sigmoid has less than a tenth of its steepest derivative, 1/4. Here that are {saturated} of {n}:",
            "batchnorm": "The same units behind a BatchNorm, with mean 0 and variance 1: {saturated} of {n}:",
            "probability": "For Gaussian z the share of saturated units is {before:.2%} at a deviation of {spread:.4g} and {after:.3%} at 1, whatever the weights.",
        },
    },
    "zh": {
        "batchnorm": {
            "own table": "{rows} 行（样本），{columns} 列（特征）。",
            "table": "一批数据有 {rows} 行（学生），每行 {columns} 个特征（科目）。",
            "statistics": "每一列共用统计量：均值 = 和 / {n}，方差 = (x - 均值)^2 之和 / {n}。",
            "normalize": "每个数：(x - 均值) / sqrt(方差 + eps)，eps = {eps:g}。gamma = 1、beta = 0 还不改变结果。",
            "by hand": "手算，{row}，{column}：({x:g} - {mean:g}) / sqrt({var:.6g} + 1e-05) = {out:.4f}。",
            "bound": "一列有 {n} 个值时，结果不会超过 sqrt({n} - 1) = {largest:.4f}；这里最大是 {seen:.4f}。结果取决于同一批里还有谁。",
            "running": "评估时没有批次，所以训练时保留滑动平均：新 = 0.9 * 旧 + 0.1 * 本批，初值为 0 和 1。方差按 和 / (n - 1) 计入：第一列是 {unbiased:.6g}，而不是 {biased:.6g}。",
        },
        "layernorm": {
            "own table": "{rows} 行（样本），{columns} 列（特征）。",
            "table": "同样的表：{rows} 行（样本），每行 {columns} 个特征。",
            "statistics": "每一行共用统计量，取自该行的 {n} 个数。",
            "normalize": "每个数：(x - 均值) / sqrt(方差 + eps)，eps = {eps:g}，均值和方差取自它所在的行。",
            "by hand": "手算，{row}，{column}：({x:g} - {mean:g}) / sqrt({var:.6g} + 1e-05) = {out:.4f}。",
            "alone": "单独归一化{row}，去掉其他行，结果相差 {difference:g}：与批次无关，训练和评估相同。",
        },
        "rmsnorm": {
            "own table": "{rows} 行（样本），{columns} 列（特征）。",
            "table": "{rows} 行，每行 {columns} 个特征。",
            "statistics": "每一行只有一个统计量：{n} 个数平方的均值，及其平方根。",
            "normalize": "每个数：x / sqrt(均方 + eps)，eps = {eps:g}。只去掉长度，不减均值。",
            "sign": "符号不变：负数有 {negative} 个，而 LayerNorm 会得到 {negative_layer} 个。",
            "same": "先减均值，RMSNorm 就是 LayerNorm；这里相差 {difference:.1g}。",
        },
        "running": {
            "series": "{n} 个值，每天一个，从 {low:.1f} 到 {high:.1f}。每个值相当于 BatchNorm 中一批的均值。",
            "own series": "{n} 个值，从 {low:.4g} 到 {high:.4g}，按顺序当作每天的值。",
            "rule": "滑动平均：新 = decay * 旧 + (1 - decay) * 今天，初值为 0。第 1 天后，decay = {decay:g}：{decay:g} * 0 + 0.1 * {first:.2f} = {after:.2f}。",
            "track": "三种记忆各自记得什么，旁边是当天的值和至今的均值：",
            "residual": "经过 t = {n} 天，初值 0 的权重还有 decay^t：",
            "wait": "要使它小于 {share:.0%}，需要这么多次更新；在此之前，评估看到的还有初值：",
            "noise": "记忆短的代价是一直存在的噪声，是单日噪声的 sqrt((1 - decay) / (1 + decay)) 倍：",
        },
        "placement": {
            "vectors": "残差流 x 和子层加上的 f(x)。方差为 {v_x:.4g} 和 {v_f:.4g}；f(x) 中含有 {overlap:.3g} 倍的 x。",
            "add": "它们的和的方差是 {v_total:.4g}；若不相关则为 {sum:.4g}。PostNorm 除以它的平方根。",
            "kept": "x 还剩 {kept:.4f}。公式 1 / sqrt(1 + v)，v = Var f / Var x = {v:.4g}，给出 {expected:.4f}。v = 1 时是 1 / sqrt(2) = 0.7071。",
            "depth": "如此继续，v = {v:.4g} 时输入经过 1 到 48 个子层后的权重：post 每层乘一次；pre 加到未被归一化的流上，只在最后的 norm 付一次代价：",
        },
        "saturation": {
            "layer": "一个单元有 {fan_in} 个方差为 1 的输入，权重标准差为 {std:g}：z = w x 的标准差为 {std:g} * sqrt({fan_in}) = {spread:.4g}。取从 -2 到 2 个标准差的九个单元：",
            "own": "{n} 个预激活值，标准差为 {spread:.4g}：",
            "sigmoid": "|z| 超过 {threshold:.3f} 时，sigmoid 的导数不到最大值 1/4 的十分之一。这里有 {saturated} / {n} 个：",
            "batchnorm": "同样的单元放在 BatchNorm 之后，均值 0、方差 1：{saturated} / {n} 个：",
            "probability": "z 服从高斯分布时，标准差 {spread:.4g} 的饱和比例是 {before:.2%}，标准差 1 时是 {after:.3%}，与权重无关。",
        },
    },
}


def title(topic: str, language: str) -> str:
    return _TITLES[language][topic]


def name(text: str, language: str) -> str:
    """A row's or column's name in that language; names that are not the library's own stay."""
    if language == "zh":
        if text.startswith("day "):
            return f"第 {text[4:]} 天"
        return _NAMES_ZH.get(text, text)
    return _NAMES_EN.get(text, text)


def sentence(topic: str, step: Step, language: str) -> str:
    """A step's sentence with its numbers."""
    numbers = {key: name(value, language) if isinstance(value, str) else value for key, value in step.numbers.items()}
    return _TEXTS[language][topic][step.key].format(**numbers)
