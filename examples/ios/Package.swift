// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "Pocketfusion",
    platforms: [.iOS(.v16)],
    products: [.library(name: "Pocketfusion", targets: ["Pocketfusion"])],
    dependencies: [.package(url: "https://github.com/google-ai-edge/LiteRT", branch: "release/2.3.0")],
    targets: [
        .target(
            name: "Pocketfusion",
            dependencies: [
                .product(name: "LiteRT", package: "LiteRT"),
                .product(name: "LiteRtMetalAccelerator", package: "LiteRT"),
            ]
        )
    ]
)
