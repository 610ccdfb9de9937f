#include "sampler.h"

#include <algorithm>
#include <cmath>

namespace {

struct Level {
    double alpha, sigma;
};

Level of_bar(double bar) { return {std::sqrt(bar), std::sqrt(1 - bar)}; }

Level of_sigma(double sigma) {
    double alpha = 1 / std::sqrt(sigma * sigma + 1);
    return {alpha, sigma * alpha};
}

// Value i of `count` from `first` to `last` in equal parts.
double between(double first, double last, int i, int count) {
    if (i > 0 && i == count - 1) return last;
    return i * ((last - first) / std::max(count - 1, 1)) + first;
}

int rounded(double x) { return static_cast<int>(std::nearbyint(x)); }  // halves to the even number

}  // namespace

Schedule::Schedule(const Json& spec, const std::string& sampler, int count)
    : spec_(spec), count_(spec["num_train_timesteps"].whole()) {
    double first = spec["beta_start"].value, last = spec["beta_end"].value, product = 1;
    bool roots = spec["beta_schedule"].string == "scaled_linear";
    for (int i = 0; i < count_; i++) {
        double beta = roots ? between(std::sqrt(first), std::sqrt(last), i, count_) : between(first, last, i, count_);
        product *= 1 - (roots ? beta * beta : beta);
        bars_.push_back(product);
        sigmas_.push_back(std::sqrt((1 - product) / product));
    }
    if (sampler == "ddim") ddim(count);
    else if (sampler == "euler") euler(count, false);
    else if (sampler == "euler-ancestral") euler(count, true);
    else if (sampler == "dpmpp-2m") dpmpp_2m(count, false);
    else if (sampler == "dpmpp-2m-karras") dpmpp_2m(count, true);
    else if (sampler == "lcm") lcm(count);
    else if (sampler == "tcd") tcd(count);
    else throw std::runtime_error("the sampler " + sampler + " is not known");
}

void Schedule::add(double alpha, double sigma, double x_0, double epsilon, double noise, double previous) {
    bool epsilon_prediction = spec_["prediction_type"].string == "epsilon";
    double a = epsilon_prediction ? x_0 / alpha : x_0 * alpha + epsilon * sigma;
    double b = epsilon_prediction ? epsilon - x_0 * sigma / alpha : epsilon * alpha - x_0 * sigma;
    steps.push_back({alpha, sigma, a, b, noise, previous});
}

void Schedule::add_at(int t, double x_0, double epsilon, double noise) {
    Level now = of_bar(bars_[t]);
    add(now.alpha, now.sigma, x_0, epsilon, noise);
}

std::vector<int> Schedule::spaced(int steps, bool above_zero) const {
    std::vector<int> made;
    const std::string& spacing = spec_["timestep_spacing"].string;
    double n = count_;
    int more = above_zero;
    for (int k = 0; k < steps; k++) {
        if (spacing == "trailing") made.push_back(rounded(n + k * (n - n / steps - n)) - 1);
        else if (spacing == "linspace") made.push_back(rounded(between(0, n - 1, steps - 1 - k + more, steps + more)));
        else made.push_back((steps - 1 - k + more) * (count_ / (steps + more)));
    }
    if (spacing == "leading") {
        int offset = std::min(static_cast<int>(spec_.number_or("steps_offset", 0)), count_ - 1 - made[0]);
        for (int& t : made) t += offset;
    }
    return made;
}

std::vector<int> Schedule::distilled(int steps) const {
    int original = std::min(50, count_);
    std::vector<int> made;
    for (int k = 0; k < steps; k++) {
        int index = static_cast<int>(std::floor(k * (static_cast<double>(original) / steps)));
        made.push_back((original - index) * (count_ / original) - 1);
    }
    return made;
}

void Schedule::ddim(int count) {
    for (int t : spaced(count, false)) {
        int then = t - count_ / count;
        double final = spec_.truth_or("set_alpha_to_one", true) ? 1 : bars_[0];
        Level later = of_bar(then >= 0 ? bars_[then] : final);
        timesteps.push_back(t);
        add_at(t, later.alpha, later.sigma);
    }
}

void Schedule::euler(int count, bool ancestral) {
    const std::string& spacing = spec_["timestep_spacing"].string;
    std::vector<double> sigmas;
    std::vector<int> whole = spaced(count, false);
    for (int k = 0; k < count; k++) {
        double t = whole[k];
        if (spacing == "linspace") t = static_cast<float>(between(0, count_ - 1, count - 1 - k, count));
        int low = std::min(static_cast<int>(t), count_ - 2);
        timesteps.push_back(t);
        sigmas.push_back((sigmas_[low + 1] - sigmas_[low]) * (t - low) + sigmas_[low]);
    }
    sigmas.push_back(spec_.text_or("final_sigmas_type", "zero") == "sigma_min" && !ancestral ? sigmas_[0] : 0);
    if (spacing != "leading") initial_scale = of_sigma(sigmas[0]).sigma;
    for (int k = 0; k < count; k++) {
        double now = sigmas[k], later = sigmas[k + 1];
        double up = ancestral ? std::sqrt(later * later * (now * now - later * later)) / now : 0;
        double down = std::sqrt(later * later - up * up);
        double scale = k < count - 1 ? of_sigma(later).alpha : 1;
        Level level = of_sigma(now);
        add(level.alpha, level.sigma, scale, scale * down, scale * up);
    }
}

void Schedule::dpmpp_2m(int count, bool karras) {
    std::vector<double> sigmas;
    if (!karras) {
        for (int t : spaced(count, true)) {
            timesteps.push_back(t);
            sigmas.push_back(sigmas_[t]);
        }
    } else {
        double first = std::pow(sigmas_.back(), 1.0 / 7), last = std::pow(sigmas_[0], 1.0 / 7);
        for (int k = 0; k < count; k++) {
            double sigma = std::pow(first + between(0, 1, k, count) * (last - first), 7);
            double wanted = std::log(sigma), t = count_ - 1;
            for (int i = 0; i + 1 < count_; i++) {
                double low = std::log(sigmas_[i]), high = std::log(sigmas_[i + 1]);
                if (wanted <= low || wanted < high) {
                    t = wanted <= low ? i : i + (wanted - low) / (high - low);
                    break;
                }
            }
            timesteps.push_back(rounded(t));
            sigmas.push_back(sigma);
        }
    }
    multistep(sigmas);
}

void Schedule::multistep(const std::vector<double>& sigmas) {
    double final = spec_.text_or("final_sigmas_type", "zero") == "sigma_min" ? sigmas_[0] : 0;
    int last = static_cast<int>(sigmas.size()) - 1;
    for (int k = 0; k <= last; k++) {
        double now = sigmas[k], later = k < last ? sigmas[k + 1] : final, change = 0;
        Level level = of_sigma(now), next = of_sigma(later);
        if (k > 0 && (k < last || (final > 0 && last + 1 >= 15))) {
            double h = std::log(now / later), before = std::log(sigmas[k - 1] / now);
            change = next.alpha * (1 - later / now) * h / (2 * before);
        }
        add(level.alpha, level.sigma, next.alpha + change, next.sigma, 0, -change);
    }
}

void Schedule::lcm(int count) {
    std::vector<int> grid = distilled(count);
    for (int k = 0; k < count; k++) {
        double scaled = grid[k] * 10.0, skip = 0.25 / (scaled * scaled + 0.25);
        double out = scaled / std::sqrt(scaled * scaled + 0.25);
        Level now = of_bar(bars_[grid[k]]), later = k + 1 < count ? of_bar(bars_[grid[k + 1]]) : Level{1, 0};
        timesteps.push_back(grid[k]);
        add_at(grid[k], later.alpha * (out + skip * now.alpha), later.alpha * skip * now.sigma, later.sigma);
    }
}

void Schedule::tcd(int count) {
    std::vector<int> grid = distilled(count);
    for (int k = 0; k < count; k++) {
        int later = k + 1 < count ? grid[k + 1] : 0;
        int target = static_cast<int>(std::floor((1 - spec_.number_or("eta", 0.3)) * later));
        Level level = of_bar(bars_[target]);
        double kept = bars_[later] / bars_[target];
        timesteps.push_back(grid[k]);
        add_at(grid[k], std::sqrt(kept) * level.alpha, std::sqrt(kept) * level.sigma, std::sqrt(1 - kept));
    }
}

std::vector<float> timestep_embedding(double timestep, const Json& spec) {
    int dim = spec["dim"].whole(), half = dim / 2;
    float shift = static_cast<float>(half - spec.number_or("downscale_freq_shift", 0));
    bool flip = spec.truth_or("flip_sin_to_cos", true);
    std::vector<float> values(dim, 0.0f);
    for (int i = 0; i < half; i++) {
        float exponent = static_cast<float>(-std::log(10000.0)) * static_cast<float>(i) / shift;
        float angle = static_cast<float>(timestep) * static_cast<float>(std::exp(static_cast<double>(exponent)));
        values[flip ? half + i : i] = static_cast<float>(std::sin(static_cast<double>(angle)));
        values[flip ? i : half + i] = static_cast<float>(std::cos(static_cast<double>(angle)));
    }
    return values;
}

std::vector<float> guidance_embedding(double scale, int dim) {
    int half = dim / 2;
    std::vector<float> values(dim, 0.0f);
    for (int i = 0; i < half; i++) {
        double angle = 1000 * (scale - 1) * std::pow(10000.0, -(static_cast<double>(i) / std::max(half - 1, 1)));
        values[i] = static_cast<float>(std::sin(angle));
        values[half + i] = static_cast<float>(std::cos(angle));
    }
    return values;
}
