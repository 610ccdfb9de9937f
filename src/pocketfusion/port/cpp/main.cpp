// Draws a picture with a bundle through LiteRT's C API: what an Android NDK build contains, and the same bytes as
// `pocketfusion generate --threads 1` on the CPU of the same kind.
//
//   draw BUNDLE UNICODE.json PROMPT SEED OUT.png [cpu|gpu] [SAMPLER STEPS]
//   draw --tokens BUNDLE UNICODE.json        prompts as a JSON list on standard input, ids as one on standard output
//
// The last line of its output is JSON: milliseconds of each part, and which networks ran wholly on the GPU.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <iostream>
#include <iterator>

#include "json.h"
#include "litert.h"
#include "noise.h"
#include "png.h"
#include "sampler.h"
#include "tokenizer.h"

namespace {

using Floats = std::vector<float>;

void check(LiteRtStatus status, const std::string& what) {
    if (status != 0) throw std::runtime_error("LiteRT cannot " + what + " (status " + std::to_string(status) + ")");
}

double now_ms() {
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// One network of a bundle. Inputs keep their values from run to run.
class Network {
  public:
    Network(LiteRtEnvironment environment, const std::string& bundle, const Json& manifest, const std::string& name,
            bool gpu)
        : spec_(manifest["networks"][name]), name_(name) {
        double began = now_ms();
        std::string path = bundle + "/" + manifest["files"][name]["path"].string;
        // half precision is all that this API gives a GPU; a network that needs more runs on the CPU
        on_gpu_ = gpu && spec_.text_or("gpu_precision", "") != "fp32";
        check(LiteRtCreateModelFromFile(environment, path.c_str(), &model_), "read " + path);
        check(LiteRtCreateOptions(&options_), "make options");
        int accelerators = on_gpu_ ? kLiteRtHwAcceleratorGpu | kLiteRtHwAcceleratorCpu : kLiteRtHwAcceleratorCpu;
        check(LiteRtSetOptionsHardwareAccelerators(options_, accelerators), "set the accelerator");
        check(LiteRtCreateCompiledModel(environment, model_, options_, &compiled_), "compile " + path);
        LiteRtSignature signature;
        size_t count;
        check(LiteRtGetModelSignature(model_, 0, &signature), "find the signature of " + path);
        check(LiteRtGetNumSignatureInputs(signature, &count), "count the inputs of " + path);
        for (size_t i = 0; i < count; i++) {
            const char* input;
            LiteRtTensor tensor;
            LiteRtTensorBufferRequirements needed;
            check(LiteRtGetSignatureInputName(signature, i, &input), "name an input of " + path);
            check(LiteRtGetSignatureInputTensorByIndex(signature, i, &tensor), "find an input of " + path);
            check(LiteRtGetCompiledModelInputBufferRequirements(compiled_, 0, i, &needed), "size an input of " + path);
            names_.push_back(input);
            inputs_.push_back(buffer(environment, tensor, needed));
        }
        LiteRtTensor tensor;
        LiteRtTensorBufferRequirements needed;
        check(LiteRtGetSignatureOutputTensorByIndex(signature, 0, &tensor), "find the output of " + path);
        check(LiteRtGetCompiledModelOutputBufferRequirements(compiled_, 0, 0, &needed), "size the output of " + path);
        output_ = buffer(environment, tensor, needed);
        load_ms = now_ms() - began;
    }

    ~Network() {
        for (LiteRtTensorBuffer input : inputs_) LiteRtDestroyTensorBuffer(input);
        LiteRtDestroyTensorBuffer(output_);
        LiteRtDestroyCompiledModel(compiled_);
        LiteRtDestroyOptions(options_);
        LiteRtDestroyModel(model_);
    }
    Network(const Network&) = delete;

    // The extents of an input, none if the network lacks it.
    std::vector<int> shape(const std::string& input) const {
        std::vector<int> extents;
        for (const Json& tensor : spec_["inputs"].items) {
            if (tensor["name"].string != input) continue;
            for (const Json& extent : tensor["shape"].items) extents.push_back(extent.whole());
        }
        return extents;
    }

    template <typename T>
    void write(const std::string& input, const std::vector<T>& values) {
        size_t i = std::find(names_.begin(), names_.end(), input) - names_.begin();
        if (i == names_.size()) throw std::runtime_error("the " + name_ + " has no input " + input);
        copy(inputs_[i], const_cast<T*>(values.data()), values.size() * sizeof(T), kLiteRtTensorBufferLockModeWrite);
    }

    Floats run() {
        check(LiteRtRunCompiledModel(compiled_, 0, inputs_.size(), inputs_.data(), 1, &output_), "run the " + name_);
        size_t bytes;
        check(LiteRtGetTensorBufferPackedSize(output_, &bytes), "size the output of the " + name_);
        Floats values(bytes / sizeof(float));
        copy(output_, values.data(), bytes, kLiteRtTensorBufferLockModeRead);
        return values;
    }

    std::string where() const {  // cpu, gpu, or both where the GPU does not take all of it
        bool all = false;
        if (on_gpu_) check(LiteRtCompiledModelIsFullyAccelerated(compiled_, &all), "say where the " + name_ + " runs");
        return !on_gpu_ ? "cpu" : all ? "gpu" : "gpu+cpu";
    }

    double load_ms = 0;

  private:
    static LiteRtTensorBuffer buffer(LiteRtEnvironment environment, LiteRtTensor tensor,
                                     LiteRtTensorBufferRequirements needed) {
        LiteRtRankedTensorType type;
        LiteRtTensorBuffer made;
        check(LiteRtGetRankedTensorType(tensor, &type), "tell a tensor's type");
        check(LiteRtCreateManagedTensorBufferFromRequirements(environment, &type, needed, &made), "make a buffer");
        return made;
    }

    void copy(LiteRtTensorBuffer buffer, void* values, size_t bytes, int mode) {
        void* address;
        size_t held;
        check(LiteRtGetTensorBufferPackedSize(buffer, &held), "size a buffer");
        if (held != bytes) throw std::runtime_error("a tensor of the " + name_ + " is of another size");
        check(LiteRtLockTensorBuffer(buffer, &address, mode), "lock a buffer");
        if (mode == kLiteRtTensorBufferLockModeWrite) std::memcpy(address, values, bytes);
        else std::memcpy(values, address, bytes);
        check(LiteRtUnlockTensorBuffer(buffer), "unlock a buffer");
    }

    const Json& spec_;
    std::string name_;
    bool on_gpu_ = false;
    LiteRtModel model_ = nullptr;
    LiteRtOptions options_ = nullptr;
    LiteRtCompiledModel compiled_ = nullptr;
    std::vector<std::string> names_;
    std::vector<LiteRtTensorBuffer> inputs_;
    LiteRtTensorBuffer output_ = nullptr;
};

Floats repeated(const Floats& values, int times) {
    Floats made;
    for (int i = 0; i < times; i++) made.insert(made.end(), values.begin(), values.end());
    return made;
}

struct Asked {
    std::string bundle, unicode, prompt, out;
    uint64_t seed;
    bool gpu;
    std::string sampler;
    int steps;
};

class Drawing {
  public:
    explicit Drawing(const Asked& asked) : asked_(asked), manifest_(Json::read(asked.bundle + "/bundle.json")) {
        check(LiteRtCreateEnvironment(0, nullptr, &environment_), "start");
    }
    ~Drawing() { LiteRtDestroyEnvironment(environment_); }
    Drawing(const Drawing&) = delete;

    void draw() {
        std::vector<Floats> texts = text();
        Floats latents = denoise(texts);
        decode(latents);
    }

  private:
    void loaded(const char* name, const Network& network) {
        std::printf("%s: loaded in %.1f ms, on %s\n", name, network.load_ms, network.where().c_str());
        said_ += std::string(said_.empty() ? "" : ", ") + "\"" + name + "\": {\"load_ms\": " +
                 std::to_string(network.load_ms) + ", \"where\": \"" + network.where() + "\"";
    }
    void ran(const std::vector<double>& ms) {
        said_ += ", \"run_ms\": [";
        for (size_t i = 0; i < ms.size(); i++) said_ += (i ? ", " : "") + std::to_string(ms[i]);
        said_ += "]}";
    }

    // The text encoder's states: of the empty prompt, where guidance asks for it, and of the prompt.
    std::vector<Floats> text() {
        Json unicode = Json::read(asked_.unicode);
        Unicode tables(unicode);
        Json file = Json::read(asked_.bundle + "/" + manifest_["files"]["tokenizer"]["path"].string);
        Tokenizer tokenizer(file, manifest_["tokenizer"], tables);
        Network encoder(environment_, asked_.bundle, manifest_, "text_encoder", asked_.gpu);
        loaded("text_encoder", encoder);
        std::vector<double> ms;
        auto encode = [&](const std::string& text) {
            double began = now_ms();
            Tokens tokens = tokenizer.encode(text);
            encoder.write("input_ids", tokens.ids);
            encoder.write("attention_mask", tokens.mask);
            Floats states = encoder.run();
            ms.push_back(now_ms() - began);
            return states;
        };
        std::vector<Floats> texts;
        if (manifest_.text_or("guidance", "classifier-free") == "classifier-free") {
            if (manifest_["files"].has("empty_prompt_embeds")) {
                std::string path = asked_.bundle + "/" + manifest_["files"]["empty_prompt_embeds"]["path"].string;
                std::string bytes = read_file(path);
                Floats states(bytes.size() / sizeof(float));
                std::memcpy(states.data(), bytes.data(), states.size() * sizeof(float));
                texts.push_back(states);
            } else {
                texts.push_back(encode(""));
            }
        }
        texts.push_back(encode(asked_.prompt));
        ran(ms);
        return texts;
    }

    Floats denoise(const std::vector<Floats>& texts) {
        const Json &defaults = manifest_["defaults"], &latents = manifest_["latents"];
        double asked_scale = defaults["guidance_scale"].value, scale = std::max(asked_scale, 1.0);
        int steps = asked_.steps ? asked_.steps : defaults["num_inference_steps"].whole();
        std::string sampler = asked_.sampler.empty() ? manifest_.text_or("sampler", "ddim") : asked_.sampler;
        Schedule schedule(manifest_["scheduler"], sampler, steps);
        size_t size = latents["height"].whole() * latents["width"].whole() * latents["channels"].whole();

        Network unet(environment_, asked_.bundle, manifest_, "unet", asked_.gpu);
        loaded("unet", unet);
        int batch = unet.shape("encoder_hidden_states")[0];
        bool folded = !unet.shape("step_coefficients").empty();
        // one call a step for both rows of text, or for each where the UNet takes one row
        std::vector<Floats> calls;
        if (batch == 2) {
            calls = {texts[0]};
            calls[0].insert(calls[0].end(), texts[1].begin(), texts[1].end());
        } else if (scale > 1) {
            calls = texts;
        } else {
            calls = {texts.back()};
        }
        unet.write("encoder_hidden_states", calls[0]);
        if (!unet.shape("timestep_cond").empty()) {
            unet.write("timestep_cond", guidance_embedding(asked_scale, unet.shape("timestep_cond")[1]));
        }

        NoiseStream noise(asked_.seed);
        Floats sample = noise.draw(size), previous;
        for (float& x : sample) x *= static_cast<float>(schedule.initial_scale);
        bool epsilon = manifest_["scheduler"]["prediction_type"].string == "epsilon";
        std::vector<double> ms;
        for (int k = 0; k < steps; k++) {
            double began = now_ms();
            const Step& step = schedule.steps[k];
            double t = schedule.timesteps[k];
            float a = static_cast<float>(step.a), b = static_cast<float>(step.b);
            if (!unet.shape("timestep_embedding").empty()) {
                Floats values = timestep_embedding(t, manifest_["time_embedding"]);
                unet.write("timestep_embedding", repeated(values, batch));
            } else {
                unet.write("timestep", Floats(batch, static_cast<float>(t)));
            }
            Floats after(size);
            if (folded) {
                unet.write("sample", sample);
                unet.write("step_coefficients", Floats{static_cast<float>(scale), a, b});
                after = unet.run();
            } else {
                unet.write("sample", repeated(sample, batch));
                Floats rows;
                for (const Floats& text : calls) {
                    if (calls.size() > 1) unet.write("encoder_hidden_states", text);
                    Floats row = unet.run();
                    rows.insert(rows.end(), row.begin(), row.end());
                }
                Floats output(rows.end() - size, rows.end());
                if (rows.size() == 2 * size && scale > 1) {
                    float w = static_cast<float>(scale);
                    for (size_t i = 0; i < size; i++) output[i] = (output[i] - rows[i]) * w + rows[i];
                }
                for (size_t i = 0; i < size; i++) after[i] = a * sample[i] + b * output[i];
                float before = static_cast<float>(step.previous);
                if (before != 0 && !previous.empty()) {
                    for (size_t i = 0; i < size; i++) after[i] += before * previous[i];
                }
                float alpha = static_cast<float>(step.alpha), sigma = static_cast<float>(step.sigma);
                previous.resize(size);
                for (size_t i = 0; i < size; i++) {  // x_0, which only some samplers look at again
                    previous[i] = epsilon ? (sample[i] - sigma * output[i]) / alpha : alpha * sample[i] - sigma * output[i];
                }
            }
            if (step.noise != 0) {
                Floats fresh = noise.draw(size);
                for (size_t i = 0; i < size; i++) after[i] += static_cast<float>(step.noise) * fresh[i];
            }
            sample = after;
            ms.push_back(now_ms() - began);
            std::printf("step %d of %d: %.1f ms\n", k + 1, steps, ms.back());
        }
        ran(ms);
        return sample;
    }

    void decode(const Floats& latents) {
        Network decoder(environment_, asked_.bundle, manifest_, "decoder", asked_.gpu);
        loaded("decoder", decoder);
        std::vector<int> tile = decoder.shape("latents");
        if (tile[1] != manifest_["latents"]["height"].whole() || tile[2] != manifest_["latents"]["width"].whole()) {
            throw std::runtime_error("the decoder takes tiles, which this example does not blend: export without --tile");
        }
        double began = now_ms();
        decoder.write("latents", latents);
        Floats image = decoder.run();
        ran({now_ms() - began});
        std::vector<uint8_t> pixels(image.size());
        for (size_t i = 0; i < image.size(); i++) {
            float level = std::min(std::max(image[i] / 2 + 0.5f, 0.0f), 1.0f) * 255;
            pixels[i] = static_cast<uint8_t>(std::nearbyint(level));  // halves to the even number
        }
        write_png(asked_.out, pixels, manifest_["image"]["width"].whole(), manifest_["image"]["height"].whole());
        std::printf("{\"format\": \"pocketfusion-draw\", %s}\n", said_.c_str());
    }

    const Asked& asked_;
    Json manifest_;
    LiteRtEnvironment environment_ = nullptr;
    std::string said_;
};

void tokens(const std::string& bundle, const std::string& unicode) {
    Json manifest = Json::read(bundle + "/bundle.json"), data = Json::read(unicode);
    Json file = Json::read(bundle + "/" + manifest["files"]["tokenizer"]["path"].string);
    Unicode tables(data);
    Tokenizer tokenizer(file, manifest["tokenizer"], tables);
    const char* separator = "[";
    for (const Json& prompt : Json::read("/dev/stdin").items) {
        Tokens made = tokenizer.encode(prompt.string);
        std::printf("%s[[", separator);
        for (size_t i = 0; i < made.ids.size(); i++) std::printf(i ? ", %d" : "%d", made.ids[i]);
        std::printf("], %d]", made.count);
        separator = ",\n";
    }
    std::printf("]\n");
}

}  // namespace

int main(int argc, char** argv) {
    std::vector<std::string> words(argv + 1, argv + argc);
    try {
        if (words.size() == 3 && words[0] == "--tokens") {
            tokens(words[1], words[2]);
        } else if (words.size() == 5 || words.size() == 6 || words.size() == 8) {
            bool gpu = words.size() > 5 && words[5] == "gpu", more = words.size() == 8;
            Asked asked{words[0], words[1], words[2], words[4], std::stoull(words[3]), gpu,
                        more ? words[6] : "",   more ? std::stoi(words[7]) : 0};
            Drawing(asked).draw();
        } else {
            std::cerr << "usage: draw BUNDLE UNICODE.json PROMPT SEED OUT.png [cpu|gpu] [SAMPLER STEPS]\n";
            return 2;
        }
    } catch (const std::exception& error) {
        std::cerr << "error: " << error.what() << "\n";
        return 2;
    }
    return 0;
}
