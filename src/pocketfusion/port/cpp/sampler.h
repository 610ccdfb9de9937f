// The steps of a bundle's sampler: all of its numbers are known before the first one (docs/samplers.md, "For ports").
#pragma once

#include <string>
#include <vector>

#include "json.h"

struct Step {
    double alpha, sigma;             // the UNet is asked of x = alpha x_0 + sigma epsilon
    double a, b;                     // x' = a x + b output + noise z + previous x_0 of the step before
    double noise = 0, previous = 0;
};

class Schedule {
  public:
    Schedule(const Json& scheduler, const std::string& sampler, int steps);

    std::vector<double> timesteps;  // falling
    std::vector<Step> steps;
    double initial_scale = 1;

  private:
    void add(double alpha, double sigma, double x_0, double epsilon, double noise = 0, double previous = 0);
    void add_at(int t, double x_0, double epsilon, double noise = 0);
    std::vector<int> spaced(int steps, bool above_zero) const;
    std::vector<int> distilled(int steps) const;
    void ddim(int steps);
    void euler(int steps, bool ancestral);
    void multistep(const std::vector<double>& sigmas);
    void dpmpp_2m(int steps, bool karras);
    void lcm(int steps);
    void tcd(int steps);

    const Json& spec_;
    int count_;
    std::vector<double> bars_, sigmas_;  // alpha^2 and sigma / alpha, by timestep
};

std::vector<float> timestep_embedding(double timestep, const Json& spec);
std::vector<float> guidance_embedding(double scale, int dim);
